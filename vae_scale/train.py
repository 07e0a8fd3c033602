"""`accelerate launch -m vae_scale.train --config configs/F.yaml`: trains a model, or resumes training."""

import os
from collections.abc import Sequence

from vae_scale.config.options import Config, to_yaml
from vae_scale.config.parsing import check_batch_size, check_image_shape, parse
from vae_scale.errors import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    config, dry_run = parse(argv)
    if dry_run:
        _print_description(config)
        return
    from vae_scale.training.trainer import train

    train(config)


def _print_description(config: Config) -> None:
    """Prints the configuration, the size of the model, memory and steps."""
    import torch
    from torch import nn

    from vae_scale.data.cache import Cache
    from vae_scale.data.shards import ShardSet
    from vae_scale.models.networks import build_model
    from vae_scale.models.vae import VAE
    from vae_scale.runtime.checkpoint import require_checkpoint
    from vae_scale.runtime.launching import resolve_precision
    from vae_scale.training.stages import class_names

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    steps = "batch size is determined when training starts"
    if config.train.batch_size != "auto":
        check_batch_size(config, world_size)
    shards = ShardSet.open(config.data.shards, Cache.from_options(config.data.cache_dir, config.data.cache_size_gib))
    train_images, test_images = len(shards.select(*config.data.train_splits)), len(shards.select(config.data.test))
    trained: nn.Module
    if config.prior.vae is None:
        check_image_shape(config.model, shards.image_shape)
        with torch.device("meta"):
            model = trained = build_model(config.model, shards.image_shape[0])
    else:
        model = VAE.from_pretrained(require_checkpoint(config.prior.vae, "prior.vae"), "ema.safetensors")
        config.model = model.config
        names = class_names(config.prior, shards)
        trained = model.add_flow(config.prior.width, config.prior.depth, names, config.prior.clusters is not None)
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    memory = 5 * 4 * parameters / 2**20  # weights, averaged weights, gradients and two moments in fp32
    if config.train.batch_size != "auto":
        batch = config.train.global_batch_size
        steps = f"{-(-config.train.images // batch):,}, {train_images / batch:,.1f} per epoch, batch size {batch}"
    print(to_yaml(config))
    print(f"model        {type(trained).__name__}, {parameters:,} parameters, latent {'x'.join(map(str, model.latent_shape))}")
    print(f"memory       {memory:,.0f} MiB per process for model and optimizer states, without activations")
    print(f"images       {train_images:,} for training, {test_images:,} held out")
    print(f"steps        {steps}")
    print(f"processes    {world_size}, precision {resolve_precision(config.train.precision)}")
    print(f"run          {config.run_dir.resolve()}")


if __name__ == "__main__":
    main()
