"""The last step of a demo: the archive as a page in the browser."""

from pathlib import Path

from orbithash.cluster.output import say
from orbithash.cluster.serving.serve import serve
from orbithash.cluster.serving.settings import ServeSettings
from orbithash.search.web.assets import Assets
from orbithash.search.web.server import is_free
from orbithash.search.web.settings import DEFAULT_LISTEN

__all__ = ["show_page"]


def show_page(archive: Path, model: Path, images: Path) -> None:
    """Serve an archive and its page on this machine until Ctrl-C; `images` is the folder of its images.

    Without the scripts of the page, print how to get them and return.
    """
    if problem := Assets().problem:
        say(problem)
        return
    serve(
        ServeSettings(
            str(archive),
            model,
            "127.0.0.1:0",
            num_shards=1,
            is_local=True,
            images=(str(images.absolute()),),
            web_address=DEFAULT_LISTEN if is_free(DEFAULT_LISTEN) else "127.0.0.1:0",
        )
    )
