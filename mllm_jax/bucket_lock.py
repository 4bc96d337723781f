"""A lock that keeps two runs out of one work directory in a bucket: see `lock`, whose file it is as an object.

Cloud Storage counts the generations of an object and refuses a write or removal that expects another generation than
the one that is there. So of several processes that want the lock one gets it, and a holder cannot renew or remove a
lock that it has lost. A holder writes the object again every `lock.BEAT` seconds; a generation that stays the same for
`lock.PATIENCE` seconds is a lock that was left behind.

What this does not give: a holder that was suspended between `check` and its write writes once more.
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterator

from absl import logging

from mllm_jax import lock
from mllm_jax.lock import LockLostError, name_of, parsed
from mllm_jax.schema import ConfigError
from mllm_jax.storage import BUCKET, Path


class BucketLock:
    """A lock that this process has taken.

    Attributes:
      path: of the object.
    """

    def __init__(self, directory: Path):
        from google.cloud import storage  # comes with gcsfs

        self.path = directory / "lock"
        bucket, _, name = str(self.path).removeprefix(BUCKET).partition("/")
        self._bucket, self._name = storage.Client(project=None).bucket(bucket), name
        # No other lock has this text, not even another one of this process.
        self._text = json.dumps({**lock.this_process(), "lock": secrets.token_hex(8)})
        self._generation = 0
        self._changing = threading.Lock()  # the heartbeat changes the generation

    def check(self) -> None:
        """Makes sure that the lock is still held; to be called before anything is written.

        Raises:
          LockLostError: another run has taken it, or somebody has removed it.
        """
        with self._changing:
            try:
                found = self._bucket.get_blob(self._name)
            except Exception as error:  # a bucket that does not answer now says nothing of who holds the lock
                logging.warning("%s cannot be read: %s", self.path, error)
                return
            if found is not None and found.generation == self._generation:
                return
            text = ""
            if found is not None:
                generation = found.generation  # a download may leave `found` without it
                with contextlib.suppress(Exception):  # it was removed or replaced since
                    text = found.download_as_bytes(if_generation_match=generation).decode(errors="replace")
                if text == self._text:  # a beat that came through although its answer was lost
                    self._generation = generation
                    return
        raise LockLostError(lock.lost(self.path, parsed(text)))

    def acquire(self) -> None:
        """Takes the lock, waiting for a sign of life of a holder that cannot be seen from here.

        Raises:
          ConfigError: another process holds it.
        """
        from google.api_core.exceptions import NotFound, PreconditionFailed

        silent: tuple[int, float] | None = None  # the holder's last sign, and since when there was none
        while True:
            with contextlib.suppress(NotFound, PreconditionFailed):  # another process was faster: look again
                found = self._bucket.get_blob(self._name)
                if found is None:
                    self._put(0)
                    return
                generation = found.generation  # of what is downloaded, which may leave `found` without it
                text = found.download_as_bytes(if_generation_match=generation)
                if text.decode(errors="replace") == self._text:  # written, although the answer was lost
                    self._generation = generation
                    return
                holder = parsed(text.decode(errors="replace"))
                silent = (generation, time.monotonic()) if silent is None else silent
                alive = lock.is_alive(holder)
                waited = time.monotonic() - silent[1]
                if alive is None and generation == silent[0] and waited >= lock.PATIENCE:
                    alive = False
                if alive is False:
                    if holder is not None:
                        logging.warning("%s was left behind by %s; taken over", self.path, name_of(holder))
                    self._put(generation)
                    return
                if alive or generation != silent[0]:
                    raise ConfigError(lock.in_use(self.path, holder))
                if waited < 1:
                    logging.warning(lock.WAITING, self.path, name_of(holder), lock.PATIENCE)
            time.sleep(1)

    def beat(self) -> None:
        """Shows a sign of life, unless the lock was lost."""
        with self._changing:
            self._put(self._generation)

    def release(self) -> None:
        """Removes the lock, unless it was lost."""
        with self._changing:
            self._bucket.blob(self._name).delete(if_generation_match=self._generation)

    def _put(self, generation: int) -> None:
        blob = self._bucket.blob(self._name)
        blob.upload_from_string(self._text, if_generation_match=generation)
        self._generation = blob.generation


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[BucketLock]:
    """Holds a directory in a bucket for the duration of the block.

    Raises:
      ConfigError: another process holds it; names the process and its host.
    """
    held = BucketLock(directory)
    held.acquire()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(lock.BEAT):
            with contextlib.suppress(Exception):  # the next one may come through; `check` tells what is lost
                held.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):  # one that stays is taken over after a while
            held.release()
