"""What the tokens of a fresh connector still say of the tower's features to a linear reader.

    python benchmarks/fresh_tokens.py
    python benchmarks/fresh_tokens.py --connectors average_pool ldp --images=800

The share of variance (R2, on a quarter of the images that the fit has not seen) of the features, averaged over each
token's cell, that a ridge regression from the connector's untrained tokens explains, in the mini study's sizes; and the
tokens' root mean square. Digits and shapes are linearly readable in the features; what is lost here, training has to
find again.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import page
from jaxtyping import Float

from mllm_jax import connectors, interop
from mllm_jax.evaluation.probes import pictures, tower_features
from mllm_jax.mini.connectors import SPEC, WIDTH, mini_options
from mllm_jax.models import paths

TOKENS, SIZE, RIDGE = 36, 84, 1e-4
SEEDS = 3  # of the connector's parameters; their mean is shown


def explained(tokens: Float[np.ndarray, "n M D"], targets: Float[np.ndarray, "n M C"]) -> float:
    """R2 of the targets by ridge regression, on the last quarter of the images; the tokens' scale does not matter."""
    begin = 3 * len(tokens) // 4
    train, wanted = (x[:begin].reshape(-1, x.shape[-1]) for x in (tokens, targets))
    test, truth = (x[begin:].reshape(-1, x.shape[-1]) for x in (tokens, targets))
    mean, center = train.mean(0), wanted.mean(0)
    train, test, wanted, truth = train - mean, test - mean, wanted - center, truth - center
    gram = train.T @ train
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    residual = truth - test @ np.linalg.solve(gram, train.T @ wanted)
    return 1 - (residual**2).sum() / (truth**2).sum()


def fresh(name: str, options: dict, features: Float[np.ndarray, "n N C"]) -> tuple[int, float, float] | None:
    """(parameters, R2, RMS); None where a connector's tokens are not cells of the image or it reads other layers."""
    connector = connectors.create(name, SPEC, WIDTH, {**mini_options(name, TOKENS), **options})
    grid, cells = SPEC.grid, connector.token_grid(SPEC.grid)
    if cells is None or connector.request() != connectors.FeatureRequest((SPEC.select_layer,)):
        return None
    rows, columns = grid[0] // cells[0], grid[1] // cells[1]
    shape = (-1, cells[0], rows, cells[1], columns, features.shape[-1])
    targets = features.reshape(shape).mean((2, 4)).reshape(len(features), -1, features.shape[-1])
    given = connectors.VisionFeatures({SPEC.select_layer: jnp.asarray(features)}, grid=grid)

    @jax.jit
    def run(key):
        params = connector.init(key, jax.tree.map(lambda x: x[:1], given))
        return params, connector.apply(params, given)

    found, squares = [], []
    for seed in range(SEEDS):
        params, tokens = run(jax.random.key(seed))
        found.append(explained(np.asarray(tokens, np.float64), targets.astype(np.float64)))
        squares.append(float(jnp.mean(tokens**2)))
    return paths.count(params["params"]), float(np.mean(found)), float(np.mean(squares)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connectors", nargs="+", choices=list(connectors.CONNECTORS), help="default: all")
    parser.add_argument("--images", type=int, default=400)
    args = parser.parse_args()
    config = interop.vision_config("mini")
    params = interop.load_vision("mini", depth=SPEC.select_layer)
    _, images = pictures(args.images, SIZE)
    features = tower_features(config, jax.tree.map(jnp.asarray, params), SPEC.select_layer)(images)
    names = args.connectors or list(connectors.CONNECTORS)
    variants = [(name, {}) for name in names]
    if not args.connectors:
        variants += [("c_abstractor", {"depth": depth}) for depth in (0, 1, 2)]
    rows = []
    for name, options in variants:
        title = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        if result := fresh(name, options, features):
            rows.append((title, f"{result[0]:,}", f"{result[1]:.2f}", f"{result[2]:.2f}"))
        else:
            print(f"{title} is left out: its tokens are not cells of the image, or it reads several layers")
    print(page.table(("connector", "parameters", "R2", "RMS"), rows))


if __name__ == "__main__":
    main()
