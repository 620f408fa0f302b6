"""Scripts: experiments of the papers and of this project, and tools."""

import os
import sys
from typing import Any


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
  """Ends the process on Ctrl-C as `lib.launch` does, even during imports."""
  if not issubclass(kind, KeyboardInterrupt):
    sys.__excepthook__(kind, error, trace)
    return
  print(
    "\ninterrupted; rerun the same command to continue.", file=sys.stderr, flush=True
  )
  os._exit(130)  # Imports open nothing that would have to be closed.


sys.excepthook = _on_uncaught
