"""Train tiny tasks in as many processes as the environment says, for test_equal.py to compare:

    equal_run.py DATA TOKENIZER OUT RUN...

Each process writes what it has learnt and what was logged.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from maskgit.common.processes import rank, world
from maskgit.engine.loop import make_accelerator
from maskgit.engine.state import State
from maskgit.joins import JOINS
from maskgit.runs import resolve

STEPS, BATCH, DECAY = 20, 8, 0.9
TOKENIZER = dict(
    channels=8,
    mult=[1, 1, 2],
    encoder_blocks=1,
    decoder_blocks=1,
    z_channels=8,
    groups=4,
    shortcut="input",
    quantizer=dict(codebook_size=16, dim=8),
)
LOSSES = dict(
    gradient=1.0,
    entropy=0.1,
    entropy_temperature=0.1,
    decay=0.5,
    dead=1.0,  # of 8 latents a code and step on average
    adversarial=0.5,
    adaptive_max=100.0,
    feature_matching=0.3,
    r1=0.5,
    r1_every=2,
)
AT_ONCE = dict(quantize_from=0, discriminator_from=0, generator_from=0, ramp=0)
IMAGE = dict(size=[16, 16], patch=8, width=16, depth=1, heads=2)
TEXT = dict(merges=300, context=24, width=16, depth=1, heads=2)

RUNS: dict[str, dict[str, Any]] = {
    "tokenizer": dict(
        task="vqgan",
        model=TOKENIZER,
        loss={**LOSSES, **dict(quantize_from=3, discriminator_from=5, generator_from=7, ramp=4)},
    ),
    "tokenizer_at_once": dict(task="vqgan", model=TOKENIZER, loss=LOSSES | AT_ONCE),
    "tokenizer_by_gradient": dict(
        task="vqgan",
        model={**TOKENIZER, "quantizer": dict(codebook_size=16, dim=8, normalize=True)},
        discriminator=dict(norm="spectral"),
        loss={
            **LOSSES,
            **AT_ONCE,
            **dict(reconstruction="l2", swapped=True, average=False, quantize_from=2),
            "adversarial_loss": "non-saturating",
        },
    ),
    "transformer": dict(
        task="maskgit",
        model=dict(width=32, depth=2, heads=2, ffn=64, dropout=0.0),
        loss=dict(unmasked_weight=0.1, label_dropout=0.3),
    ),
    "official": dict(
        task="maskgit",
        model=dict(architecture="official", width=32, depth=1, heads=2, ffn=64, dropout=0.0),
    ),
    "clip": dict(
        task="clip",
        model=dict(embed=16, image=IMAGE, text=TEXT),
        loss=dict(positives="caption", smoothing=0.1),
    ),
    "siglip": dict(
        task="clip",
        model=dict(embed=16, image=IMAGE, text=TEXT, loss="sigmoid", scale=10.0, bias=-10.0),
    ),
    "classifier": dict(task="classifier", model=dict(size=16, widths=[8, 16])),
}


def prepared(name: str, data: str, tokenizer: str, micro: int) -> Any:
    """The run called `name`, each process taking its share in `micro` micro-batches."""
    content = RUNS[name] | {"data": dict(path=data, size=[16, 16], crop="random", heldout=0.2)}
    if content["task"] == "maskgit":
        content |= {"tokenizer": tokenizer}
        content["data"]["crop"] = "center"
    if content["task"] == "vqgan":
        content["discriminator"] = {"channels": 8, "layers": 1, **content.get("discriminator", {})}
    content["train"] = dict(
        steps=STEPS,
        batch_size=BATCH,
        micro_batch=BATCH // world() // micro if micro > 1 else None,
        warmup=2,
        clip=0.5,
        ema=DECAY,
        seed=3,
        device="cpu",
        dtype="fp32",
    )
    return resolve(content, OmegaConf.create(), smoke=False)[0]


def train(run: Any, dtype: torch.dtype, steps: int, folder: Path) -> tuple[dict, list]:
    """What was learnt, by name, and what was logged at each step."""
    accelerator = make_accelerator(run.train)
    torch.manual_seed(run.train.seed)
    task, stream, *_ = JOINS[run.task](run, folder, lambda line: None)
    for part in task.parts.values():
        part.to(dtype)
    state = State(task, run.train, accelerator, print)
    batches, logs, found, history = stream(0), [], {}, [weights(state.model)]
    restarts = 0
    for step in range(steps):
        state.heed(state.update(next(batches), step))
        logs.append(state.logged())
        history.append(weights(state.model))
        if "codebook" in task.parts:
            restarts += (task.parts["codebook"].count == 1).sum()
        for name, optimizer in state.optimizers.items() if step == 0 else ():
            for i, moments in optimizer.state_dict()["state"].items():
                found[f"gradient/{name}/{i}"] = moments["exp_avg"] / (1 - run.train.betas[0])
    for name, module in {**task.parts, "average": state.ema.module}.items():
        found |= {f"{name}/{key}": tensor for key, tensor in module.state_dict().items()}
    found["history"] = torch.stack(history)  # (steps + 1, weights of the model)
    found["averaged"] = weights(state.ema.module)
    found["restarts"] = torch.as_tensor(restarts)
    return {key: tensor.detach().clone().contiguous() for key, tensor in found.items()}, logs


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def main(data: str, tokenizer: str, out: Path, names: list[str]) -> None:
    for name in names:
        for micro in (1, 2, 4) if world() == 1 else (1, 2):
            short = 3 if RUNS[name]["task"] == "vqgan" else STEPS
            for dtype, steps in ((torch.float64, STEPS), (torch.float32, short)):
                run = prepared(name, data, tokenizer, micro)
                # Its tokens are made once.
                found, logs = train(run, dtype, steps, out / f"{name}-{world()}")
                kind = str(dtype).removeprefix("torch.")
                stem = f"{name}-{kind}-{world()}-{micro}-{rank()}"
                save_file(found, out / f"{stem}.safetensors")
                (out / f"{stem}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
