"""The error that ends a run if too many steps in a row are skipped."""

import json
from pathlib import Path

from vae_scale.data.stream import Stream
from vae_scale.errors import UserError
from vae_scale.runtime.checkpoint import list_checkpoints

SKIP_REASON = "gradients not finite, or their norm above optimizer.skip_threshold"


def divergence_error(images_seen: int, skips: int, stream: Stream, run_dir: Path, is_main_process: bool) -> UserError:
    """Returns an error for a run whose last `skips` steps were skipped. Rank 0 writes the first batch to skipped_steps.json."""
    first = images_seen - skips * stream.plan.batch
    images = stream.shards.sample_names(stream.plan.rows(first))
    path = run_dir / "skipped_steps.json"
    if is_main_process:
        path.write_text(json.dumps({"images_seen": first, "images": images}, indent=2))
    checkpoints = list_checkpoints(run_dir)
    return UserError(
        f"{skips} steps in a row were skipped, from step {first // stream.plan.batch + 1:,} (image {first:,}) on: "
        f"{SKIP_REASON}; lower optimizer.lr or use train.precision fp32, and run again: training resumes from "
        f"{checkpoints[-1] if checkpoints else 'the start, because there is no checkpoint'}. The first skipped batch contains "
        f"{', '.join(images[:3])}, ... (complete list: {path})"
    )
