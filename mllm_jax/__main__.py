"""`python -m mllm_jax VERB` is the same as `mllm-jax VERB`."""

import sys

from mllm_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
