"""The wandb workspace that shows runs of this trainer: what matters most comes first."""

import json
from typing import Any

from wandb_workspaces import workspaces
from wandb_workspaces.reports import v2 as panels

NAME = "vae_scale"
# Panels in reading order: section, whether it is open, and in it titles with the metrics of a chart.
SECTIONS: tuple[tuple[str, bool, dict[str, list[str]]], ...] = (
    (
        "Quality",
        True,
        {
            "bits/dim, training and held out": ["train/bits_per_dim", "eval/bits_per_dim"],
            "PSNR of held-out reconstructions (dB)": ["eval/psnr_db"],
            "velocity error of the flow": ["train/loss", "eval/velocity_error"],
        },
    ),
    (
        "What the loss is made of (nats per image)",
        True,
        {
            "reconstruction": ["train/reconstruction_nats", "eval/reconstruction_nats"],
            "KL divergence": ["train/kl_nats", "eval/kl_nats"],
            "KL divergence per latent channel": ["eval/kl_nats_per_channel"],
            "beta": ["train/beta"],
            "critic": ["train/critic_loss"],
        },
    ),
    (
        "Is it healthy?",
        True,
        {
            "gradient norm": ["train/grad_norm"],
            "steps left out": ["train/left_out"],
            "learning rate": ["train/lr"],
            "images of bad shards replaced": ["data/missing_images"],
        },
    ),
    (
        "Is it fast?",
        True,
        {
            "images per second": ["speed/images_per_second"],
            "share of the time spent waiting for data": ["data/wait_share"],
            "memory (bytes)": ["speed/memory_bytes"],
            "epoch": ["train/epoch"],
        },
    ),
)
PICTURES = {"samples": "samples/samples", "held-out images and their reconstructions": "samples/reconstructions"}


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The workspace of a project, not yet saved.

    Args:
        entity: User or team.
        project: `track.project` of the runs.
    """
    pictures = [panels.MediaBrowser(title=title, media_keys=[key], num_columns=1) for title, key in PICTURES.items()]
    charts = [
        workspaces.Section(
            name=name,
            is_open=opened,
            panels=[panels.LinePlot(title=title, x="images", y=list(keys)) for title, keys in content.items()],
        )
        for name, opened, content in SECTIONS
    ]
    shown = [charts[0], workspaces.Section(name="Pictures", is_open=True, panels=pictures), *charts[1:]]
    settings = workspaces.WorkspaceSettings(x_axis="images", smoothing_type="none")
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=shown, settings=settings)


def as_json(found: workspaces.Workspace) -> dict[str, Any]:
    """What wandb is sent to save it."""
    sent: dict[str, Any] = json.loads(found._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return sent
