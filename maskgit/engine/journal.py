"""What a run notes as it goes: numbers and pictures, for people and for TensorBoard."""

import json
from pathlib import Path

from torch import Tensor


class Journal:
    """metrics.jsonl, pictures, and the same for TensorBoard."""

    def __init__(self, run: Path, start: int) -> None:
        """Go on at step `start`: what a killed run noted beyond its last checkpoint is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        (run / "samples").mkdir(parents=True, exist_ok=True)
        self.file = run / "metrics.jsonl"
        self.samples = run / "samples"
        if self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step(line) <= start]
            self.file.write_text("".join(kept))
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()

    def picture(self, step: int, image: Tensor) -> None:
        """`image` (3, H, W) in [0, 1]."""
        from torchvision.utils import save_image

        save_image(image, self.samples / f"step_{step:08d}.png")
        self.board.add_image("samples", image.cpu(), step)


def _step(line: str) -> int:
    return json.loads(line)["step"]
