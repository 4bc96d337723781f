"""One of several processes that compute together until one of them ends: see test_endings.py.

Arguments: the process that ends, and how.
"""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from mllm_jax.cli import script
from mllm_jax.parallel import endings, processes

who, how = int(sys.argv.pop(1)), sys.argv.pop(1)


def disk():
    raise OSError("a disk of this host only cannot be read")


def end():
    if how == "mistake":
        raise ZeroDivisionError("a mistake of ours\nwith details")
    if how == "thread":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(disk).result()
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with `&` ignores it
        os.kill(os.getpid(), signal.SIGINT)
    if how == "closing":
        endings.CLOSING = 4
        try:
            with endings.told():
                disk()
        finally:
            time.sleep(300)  # for what the others would have to do
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def main(_):
    logging.set_verbosity(logging.ERROR)
    processes.join()
    processes.total(1)  # everybody is there
    import jax

    index = jax.process_index()
    print("begun", flush=True)
    try:
        if how == "agreed":
            with processes.together("files read"):
                if index == who:
                    disk()
        if index == who:
            end()
        processes.total(1)  # the others wait in here
        raise AssertionError("went on without the one that has ended")
    finally:
        print("closed", flush=True)


script.run(main)
