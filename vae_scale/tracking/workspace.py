"""The wandb workspace of a project."""

from wandb_workspaces import workspaces
from wandb_workspaces.reports import v2 as panels

from vae_scale.tracking.panels import CHARTS

IMAGES = {"Samples": "samples/samples", "Held-out images and their reconstructions": "samples/reconstructions"}


def build_workspace(entity: str, project: str) -> workspaces.Workspace:
    """Returns an unsaved workspace of a project with the charts of `CHARTS` and the images.

    Args:
        entity: User or team.
        project: `track.project` of the runs.
    """
    sections = {
        name: [panels.LinePlot(title=title, x="images", y=list(metrics)) for title, metrics in charts.items()]
        for name, charts in CHARTS.items()
    }
    sections["Images"] = [panels.MediaBrowser(title=title, media_keys=[key], num_columns=1) for title, key in IMAGES.items()]
    order = sorted(sections, key=lambda name: name not in ("Quality", "Images"))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="vae_scale",
        sections=[workspaces.Section(name=name, is_open=True, panels=sections[name]) for name in order],
        settings=workspaces.WorkspaceSettings(x_axis="images", smoothing_type="none"),
    )
