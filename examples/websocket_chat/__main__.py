"""Serve the chat; the arguments are those of uvicorn, such as `--port 8001`."""

import sys

import uvicorn

if __name__ == "__main__":
    # Left to itself, uvicorn imports what it finds for WebSockets, deprecated modules too.
    uvicorn.main(["examples.websocket_chat.app:app", "--ws", "wsproto", *sys.argv[1:]])
