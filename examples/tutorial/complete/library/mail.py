"""Mail to readers."""

import logging


async def send_mail(reader: str, text: str) -> None:
    logging.warning("%r: %s", reader, text)  # call your mail service here
