"""Messages of errors with the names that a command line gives to methods and settings."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Sequence

from ackd_lightning.config.files import method_fragment
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import split_configs


def raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an error; nothing for one that was not raised.

    Args:
        error: Error.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def as_given(error: ACKDError, arguments: Sequence[str]) -> str:
    """Return a message with the configuration of a method whose special case it is, and with options of the data.

    ``method ATSC`` becomes ``method ATSC (simkd)``, ``set root to`` of a data module ``set --data.root to``, and
    ``pass on_class_mismatch=ignore`` the option of that name.

    Args:
        error: Error that was raised.
        arguments: Command line.
    """
    message = str(error)
    if raised_in(error).startswith("ackd_lightning.data."):
        message = re.sub(r"(: |, or )set (\w+) to\b", r"\1set --data.\2 to", message)
    message = re.sub(r"\bpass on_class_mismatch='?ignore'?", "pass --model.on_class_mismatch ignore", message)
    with contextlib.suppress(ACKDError):  # which the message is about
        fragment = method_fragment(split_configs(arguments)[0])
        named = re.search(r"\bmethod ([A-Z]\w*)", message)
        if fragment and named and named[1].lower() not in fragment.lower().split("_"):
            return message.replace(named[0], f"{named[0]} ({fragment})", 1)
    return message
