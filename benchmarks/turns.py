"""Two sides of a comparison, each in a process of its own: one computes while the others wait."""

import multiprocessing
from typing import Any


class Side:
    """An object that lives in a fresh process; `call` runs one of its methods there and waits for the result.

        torch, ours = Side(Torch, directory), Side(Ours, directory)
        for _ in range(rounds):
            seconds["torch"] += torch.call("run", case)
            seconds["ours"] += ours.call("run", case)

    The process imports the script again, so what only one side needs (torch, jax) is imported inside its class.
    """

    def __init__(self, make: Any, *args: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *args: Any) -> Any:
        """What the method returns.

        Raises:
          EOFError: the process failed; its traceback is on stderr.
        """
        self._pipe.send((method, args))
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Any, args: tuple) -> None:
    made = make(*args)
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(made, method)(*given))
