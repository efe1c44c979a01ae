"""Serve the chat; arguments are passed to uvicorn, such as `--port 8001`."""

import sys

import uvicorn

if __name__ == "__main__":
    # By default, uvicorn imports any WebSocket library it finds, even deprecated modules.
    uvicorn.main(["examples.websocket_chat.app:app", "--ws", "wsproto", *sys.argv[1:]])
