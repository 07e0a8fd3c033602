"""The charts of the metrics, in reading order, shared by the report and the wandb workspace."""

# Section -> title -> metrics that share a chart.
CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Quality": {
        "Bits per dimension": ("train/bits_per_dim", "eval/bits_per_dim"),
        "PSNR of reconstructions (dB)": ("eval/psnr",),
        "Velocity error of the flow": ("eval/velocity_error",),
    },
    "Loss terms (nats per image)": {
        "Loss": ("train/loss",),
        "Negative ELBO": ("train/neg_elbo", "eval/neg_elbo"),
        "Reconstruction": ("train/reconstruction", "eval/reconstruction"),
        "KL divergence": ("train/kl", "eval/kl"),
        "KL divergence per latent channel": ("eval/kl_per_channel",),
    },
    "Optimization": {
        "Gradient norm before clipping": ("train/grad_norm",),
        "Skipped steps": ("train/skipped_steps",),
        "Learning rate": ("train/lr",),
        "Epoch": ("train/epoch",),
    },
    "Performance": {
        "Images per second": ("perf/images_per_second",),
        "Fraction of time spent loading data": ("perf/data_loading_fraction",),
        "Memory (bytes)": ("perf/memory_bytes",),
        "Replaced images of corrupt shards": ("data/replaced_images",),
    },
}
