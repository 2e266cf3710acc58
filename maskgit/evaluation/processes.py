"""The processes that `accelerate launch` or `torchrun` started, if it was one of them."""

import os
from datetime import timedelta


class Processes:
    """This one's number among how many; a process started alone is the first of one."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = int(os.environ.get("RANK", "0"))
        self.first = self.index == 0

    def device(self, name: str) -> str:
        """The device for this process, where `name` is what the option says."""
        import torch

        if self.count == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            # For barriers alone, so on GPUs too; a slow process may take its time.
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()
