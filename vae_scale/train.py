"""`accelerate launch -m vae_scale.train --config configs/F.yaml`: trains a VAE, or goes on training it."""

from collections.abc import Sequence

from vae_scale.config import Config, as_yaml, check_processes, check_resolution, parse
from vae_scale.errors import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    config, dry_run = parse(argv)
    if dry_run:
        _describe(config)
        return
    from vae_scale.training.trainer import train

    train(config)


def _describe(config: Config) -> None:
    """Prints what training would do, without doing it."""
    import os

    import torch
    from torch import nn

    from vae_scale.data.shards import ShardSet
    from vae_scale.data.storage import Cache
    from vae_scale.models.networks import build
    from vae_scale.models.vae import VAE
    from vae_scale.training import checkpoint
    from vae_scale.training.launching import resolve_precision

    processes = int(os.environ.get("WORLD_SIZE", 1))
    auto = config.train.batch_size == "auto"
    if not auto:
        check_processes(config, processes)
    shards = ShardSet.open(config.data.shards, Cache.configured(config.data.cache_dir, config.data.cache_gib))
    images = len(shards.select(*config.data.train_splits))
    held_out = len(shards.select(config.data.test))
    trained: nn.Module
    if config.prior.vae is None:
        check_resolution(config.model, shards.image_shape)
        with torch.device("meta"):
            model = trained = build(config.model, shards.image_shape[0])
    else:
        model = VAE.from_pretrained(checkpoint.newest_of(config.prior.vae, "prior.vae"), "ema.safetensors")
        config.model = model.config
        trained = model.add_flow(config.prior.width, config.prior.depth, config.prior.patch, shards.class_names)
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    print(as_yaml(config))
    print(f"model        {type(trained).__name__}, {parameters:,} parameters, latent {'x'.join(map(str, model.latent_shape))}")
    # weights, gradients, two moments and the average, all in fp32
    print(f"memory       {5 * 4 * parameters / 2**20:,.0f} MiB per process for weights and optimizer, besides activations")
    print(f"images       {images:,} to train on, {held_out:,} held out")
    if auto:
        print("steps        as many images each as fit into memory, which is found out when training begins")
    else:
        batch = config.train.batch
        print(f"steps        {images / batch:,.1f} per epoch, {-(-config.train.images // batch):,} in all, {batch} images each")
    print(f"processes    {processes}, precision {resolve_precision(config.train.precision)}")
    print(f"run          {config.folder.resolve()}: config.yaml, checkpoints/, samples/, metrics.jsonl")


if __name__ == "__main__":
    main()
