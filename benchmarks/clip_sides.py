"""The processes that `benchmarks.clip_step` measures: ours, open_clip's, and what both are given."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.common import child_main
from benchmarks.step_runs import Length, Stopwatch

CAPTION_WORDS, WORDS, IMAGE = (6, 20), 2000, 128  # of a caption; of all; pixels of a picture's side
SIDE, PATCH, WIDTH, LAYERS, HEADS, DIM, CONTEXT = 96, 16, 192, 4, 3, 128, 77
LR = 5e-4


def prepare(home: str, pairs: int) -> dict[str, Any]:
    """Pictures and captions as Parquet and as files, and our model folder."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from cluster.prepare import make_model_folder
    from data_services.sources import open_source
    from trainers.device import fast_bf16, prepare_device

    root, draw = Path(home), np.random.default_rng(0)
    words = ["".join(chr(97 + i) for i in draw.integers(0, 26, draw.integers(3, 9))) for _ in range(WORDS)]
    captions = [" ".join(draw.choice(words, draw.integers(*CAPTION_WORDS))) for _ in range(pairs)]
    pictures = []
    (root / "pictures").mkdir()
    for i in range(pairs):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8))
        out = io.BytesIO()
        coarse.resize((IMAGE, IMAGE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        pictures.append(out.getvalue())
        (root / "pictures" / f"{i:06}.jpg").write_bytes(pictures[-1])
    (root / "captions.txt").write_text("\n".join(captions))
    pq.write_table(pa.table({"query": captions, "positive": pa.array(pictures, pa.binary())}), root / "pairs.parquet")
    recipe = our_recipe(root, pairs, Length(1, 1), "fp32", "auto")
    sources = tuple(open_source(source, root) for source in recipe.data.sources)
    make_model_folder(recipe, root / "run" / "model", sources)
    return {"precision": "bf16" if fast_bf16(prepare_device(None, False)) else "fp32"}


def our_recipe(root: Path, batch: int, length: Length, precision: str, caching: str) -> Any:
    from cluster.config import Recipe

    sizes = {"hidden": WIDTH, "layers": LAYERS, "heads": HEADS, "intermediate": 4 * WIDTH}
    image = {"architecture": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH, **sizes}
    text = {"architecture": "clip_text_model", "dropout": 0.0, "vocabulary": 4096, **sizes}
    return Recipe.model_validate(
        {
            "name": "clip",
            "data": {
                "sources": [{"path": str(root / "pairs.parquet"), "kinds": {"positive": "image"}}],
                "batch": batch,
                "steps": length.steps,
            },
            "model": {
                "config": text,
                "bidirectional": False,
                "pooling": "last",
                "max_tokens": CONTEXT,
                "head": {"sizes": [DIM], "bias": False},
                "image": {"config": image, "pooling": "own"},
            },
            "objective": {"temperature": {"start": 0.07}},
            "optimizer": {"lr": LR, "clip_norm": 0},
            "engine": {"precision": precision, "caching": caching, "budget_tokens": 4096},
            "evaluation": {"validation": None, "heldout": None},
        }
    )


def ours(home: str, batch: int, length: dict[str, int], precision: str, caching: str = "auto") -> dict[str, Any]:
    """Our training loop over LocalStream, as a worker runs it; checkpoints aside."""
    from cluster.models import tokenizer_of
    from cluster.paths import RunPaths
    from cluster.worker import Task, build_step
    from data_services.sources import open_source
    from data_services.stream import LocalStream, plan_of, reader_of
    from trainers import loop
    from trainers.collectives import Group
    from trainers.faults import Faults

    root, steps, watch, group = Path(home), Length(**length), Stopwatch(), Group()
    recipe = our_recipe(root, batch, steps, precision, caching)
    sources = [open_source(source, root) for source in recipe.data.sources]
    run = RunPaths(root / "run")
    reader = reader_of(recipe.data, plan_of(recipe.data, sources, 0), sources, tokenizer_of(run.model))
    contrast = build_step(Task(recipe, run, steps.steps, {}), group, {})
    before = resident_bytes()
    loop.run(
        loop.Job(
            step=contrast,
            batches=LocalStream(reader, 1, 0, recipe.engine.budget_tokens),
            start=0,
            stop=steps.steps,
            save=lambda at: None,
            checkpoint=recipe.checkpoint,
            group=group,
            sink=lambda step, metrics: watch.step_done(),
            stop_requested=lambda: False,
            peak_flops=1.0,
            faults=Faults(recipe.faults, group),
        )
    )
    return watch.result(batch, steps) | {"cached": contrast.cached} | grown(before)


def peer(
    home: str, batch: int, length: dict[str, int], precision: str, workers: int, accum_freq: int = 1
) -> dict[str, Any]:
    """open_clip's own `train_one_epoch` over a DataLoader of the files; no evaluation, no checkpoints.

    accum_freq  its caching: so many batches of batch / accum_freq pairs make a step
    """
    import torch
    from open_clip import CLIP, ClipLoss, image_transform
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip_train.train import train_one_epoch
    from torch.utils.data import DataLoader

    steps, watch = Length(**length), Stopwatch()
    small = batch // accum_freq
    data: Any = Pictures(Path(home), image_transform(SIDE, is_train=False), steps.steps * batch)
    loader: Any = DataLoader(data, small, num_workers=workers)
    loader.num_batches, loader.num_samples = len(loader), len(data)
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=LAYERS, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIDE)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=data.vocabulary, width=WIDTH, heads=HEADS, layers=LAYERS)
    model = CLIP(DIM, vision, text, output_dict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    args = SimpleNamespace(
        device="cpu",
        precision="amp_bf16" if precision == "bf16" else "fp32",
        distill=False,
        accum_freq=accum_freq,
        skip_scheduler=False,
        horovod=False,
        grad_clip_norm=None,
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=small,
        log_every_n_steps=10**9,
        log_local=False,
        wandb=False,
        save_logs=False,
    )
    before = resident_bytes()
    optimizer.register_step_post_hook(lambda *_: watch.step_done())
    feed = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    train_one_epoch(model, feed, ClipLoss(), 0, optimizer, None, lambda step: None, None, args)
    return watch.result(batch, steps) | grown(before)


class Pictures:
    """Picture and caption tokens by number, from the files; captions as open_clip wants them: padded to 77, and the
    largest id ends the text."""

    def __init__(self, root: Path, transform: Any, count: int) -> None:
        from data_services.tokenizer import FolderTokenizer

        self._root, self._transform, self._count = root, transform, count
        self._captions = (root / "captions.txt").read_text().splitlines()
        self._tokenizer = FolderTokenizer(root / "run" / "model", CONTEXT - 1, {})
        self._end = 4096
        self.vocabulary = self._end + 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        import torch
        from PIL import Image

        if i >= self._count:
            raise IndexError(i)
        i %= len(self._captions)
        tokens = torch.zeros(CONTEXT, dtype=torch.int64)
        ids = torch.from_numpy(self._tokenizer([self._captions[i]], "query")[0].astype("int64"))
        tokens[: len(ids)] = ids
        tokens[len(ids)] = self._end
        with Image.open(self._root / "pictures" / f"{i:06}.jpg") as picture:
            return self._transform(picture), tokens


def without_compiled_operators() -> None:
    """torchvision's wheel may be built for another torch than a CPU one; its transforms need none of its operators."""
    import torch

    if torch.cuda.is_available():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
    _KEPT.append(library)


_KEPT: list[Any] = []  # an operator lives as long as its library


def resident_bytes() -> int:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def grown(before: int) -> dict[str, int]:
    """The most that was held beyond what was held before the first step."""
    return {"grown_bytes": max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)}


if __name__ == "__main__":
    without_compiled_operators()  # transformers imports torchvision where it is there, on our side too
    child_main({"prepare": prepare, "ours": ours, "peer": peer})
