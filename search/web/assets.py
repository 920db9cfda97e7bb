"""The files of static/: scripts and styles of the page, and those of other projects in static/vendor/."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["VENDOR_FILES", "Assets", "serve_asset"]

# Files of other projects without which there is no page; `make vendor` puts them into static/vendor/.
VENDOR_FILES = ("htmx.min.js", "ol.js", "ol.css", "land-110m.json")

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}
# A year: the address of a file changes when any file changes.
_FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class _Asset:
    media_type: str
    content: bytes
    compressed: bytes


class Assets:
    """The files of a folder, which are read once."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or Path(__file__).parent / "static"
        self._files = {
            path.relative_to(folder).as_posix(): _Asset(_TYPES[path.suffix], content, gzip.compress(content, mtime=0))
            for path in sorted(folder.rglob("*"))
            if path.suffix in _TYPES and path.is_file() and not path.name.startswith(".")
            for content in [path.read_bytes()]
        }
        digest = hashlib.sha256()
        for name, file in self._files.items():
            digest.update(name.encode() + b"\0" + hashlib.sha256(file.content).digest())
        self.version = digest.hexdigest()[:16]

    @property
    def problem(self) -> str | None:
        """Why there is no page, in one sentence; None if all its files are there."""
        missing = [name for name in VENDOR_FILES if f"vendor/{name}" not in self._files]
        if not missing:
            return None
        return (
            f"The page is not available because its scripts are not installed ({', '.join(missing)}): run `make vendor`"
            " in the checkout, or install a wheel that contains them; the JSON door at /api works without them."
        )

    def address(self, path: str) -> str:
        """Return the address of a file, which may be cached for ever. Raises `KeyError` for an unknown file."""
        if path not in self._files:
            raise KeyError(f"static/{path} does not exist")
        return f"/static/{self.version}/{path}"

    def find(self, path: str) -> _Asset | None:
        """Return a file; None for an unknown one."""
        return self._files.get(path)


async def serve_asset(request: Request) -> Response:
    """Answer GET /static/VERSION/PATH."""
    assets: Assets = request.app.state.assets
    asset = assets.find(request.path_params["path"])
    if asset is None:
        raise HTTPException(404)
    # A page that was loaded before an update asks for an older version. It gets the current file and does not keep it.
    is_current = request.path_params["version"] == assets.version
    headers = {"Cache-Control": _FOREVER if is_current else "no-cache", "Vary": "Accept-Encoding"}
    content = asset.content
    if "gzip" in request.headers.get("accept-encoding", "") and len(asset.compressed) < len(content):
        content = asset.compressed
        headers["Content-Encoding"] = "gzip"
    return Response(content, media_type=asset.media_type, headers=headers)
