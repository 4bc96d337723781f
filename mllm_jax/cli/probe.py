"""`mllm-jax probe`: linear probes of a vision tower on mini-world images, beside raw pixels and a random tower."""

import argparse
import pathlib

from mllm_jax import files, no_torch
from mllm_jax.console import make_console, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision", default="mini", help='"mini", a directory or a hub id')
    parser.add_argument("--layer", type=int, default=-2, help="hidden state (default -2, the penultimate)")
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument(
        "--difficulty",
        choices=("standard", "full", "graded"),
        default="standard",
        help="of the images' scenes",
    )
    parser.add_argument("--json-report", type=pathlib.Path)


def run(args: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp

    from mllm_jax import interop
    from mllm_jax.connectors.base import FeatureRequest

    no_torch.unblock()
    from mllm_jax.evaluation import probes
    from mllm_jax.mini.world.difficulty import DIFFICULTIES
    from mllm_jax.models.vit import VisionTransformer

    config = interop.vision_config(args.vision)
    layer = config.resolve_layer(args.layer)
    trained = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), interop.load_vision(args.vision, depth=layer)
    )
    empty = jnp.zeros((1, args.image_size, args.image_size, 3), jnp.uint8)
    random = VisionTransformer(config, FeatureRequest((layer,))).init(jax.random.key(0), empty)["params"]
    difficulty = DIFFICULTIES[args.difficulty]
    scenes, images = probes.pictures(args.pictures, args.image_size, difficulty=difficulty)
    grid = args.image_size // config.patch
    results = {
        name: probes.probe(features, scenes, images, grid)
        for name, features in (
            ("tower", probes.tower_features(config, trained, layer)),
            ("random tower", probes.tower_features(config, random, layer)),
            ("pixels", probes.pixel_features(config.patch)),
        )
    }
    rows = []
    for name, row in results["tower"].items():
        values = [f"{result[name]['accuracy']:.1%}" for result in results.values()]
        rows.append((name, *values, f"{row['majority']:.1%}", str(row["n"])))
    title = f"{args.vision} hs[{layer}] at {args.image_size} px, {args.pictures} images ({args.difficulty})"
    print_table(make_console(), ("probe", *results, "majority", "n"), rows, title)
    if args.json_report:
        files.write_json(args.json_report, results)
    return 0
