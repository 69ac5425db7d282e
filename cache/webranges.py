"""A URL and a range in, the bytes of a 206 answer out: an HTTP file system that takes nothing else for data.

The one that comes with fsspec takes any answer. A server that ignores ranges would send a whole shard for every
utterance; here the answer is refused before its body is read. So is one in another encoding, which could be a bomb.
"""

import re
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

from cache.errors import StoreError

CONNECT_SEC = 10.0
READ_SEC = 30.0  # without a byte
REQUEST_SEC = 300.0


class WebRanges(HTTPFileSystem):
    """Ranges over HTTP, strictly (RFC 9110, section 14)."""

    def __init__(self, **kwargs: Any) -> None:
        timeout = aiohttp.ClientTimeout(total=REQUEST_SEC, sock_connect=CONNECT_SEC, sock_read=READ_SEC)
        client = {"timeout": timeout, "auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}
        super().__init__(client_kwargs=client, **kwargs)

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes [start, end) of a file, fewer only where it ends.

        Raises:
            FileNotFoundError: 404.
            PermissionError: 401, 403.
            StoreError: the server does not do ranges.
            OSError: another answer, or a connection that broke off (aiohttp's errors too).
        """
        assert start is not None
        assert end is not None
        assert start < end
        session = await self.set_session()
        async with session.get(self.encode_url(url), headers={"Range": f"bytes={start}-{end - 1}"}) as answer:
            if answer.status == 404:
                raise FileNotFoundError(url)
            if answer.status in (401, 403):
                raise PermissionError(f"the server refuses access ({answer.status})")
            if answer.status == 416 and start == 0:
                return b""
            if answer.status == 200:
                raise StoreError("the server ignores ranges and sends the whole file")
            if answer.status != 206:
                raise OSError(f"the server answers {answer.status} {answer.reason}")
            place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not place or answer.headers.get("Content-Encoding", "identity") != "identity":
                raise StoreError("the server answers with something that is no plain range of bytes")
            first, last, total = int(place[1]), int(place[2]), place[3]
            whole = last + 1 == (end if total == "*" else min(end, int(total)))
            if first != start or not whole:
                raise OSError(f"the server sends bytes {first} to {last + 1} for {start} to {end}")
            return await answer.content.readexactly(last + 1 - first)
