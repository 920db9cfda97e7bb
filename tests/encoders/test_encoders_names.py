"""The names of the package `orbithash.encoders`."""

import subprocess
import sys

import pytest

import orbithash.encoders


def test_names_are_imported_when_they_are_used():
    script = (
        "import sys, orbithash.encoders as e; assert not {'torch', 'lance', 'pyarrow'} & set(sys.modules); "
        "from orbithash.encoders import Archive; assert 'torch' not in sys.modules; "
        "from orbithash.encoders import HashModel; assert 'torch' in sys.modules; print(Archive, HashModel)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Archive" in ended.stdout
    assert "HashModel" in ended.stdout


def test_names_that_do_not_exist():
    assert {"Archive", "HashModel"} <= set(dir(orbithash.encoders))
    with pytest.raises(AttributeError, match=r"module 'orbithash.encoders' has no attribute 'Archives'"):
        orbithash.encoders.Archives
