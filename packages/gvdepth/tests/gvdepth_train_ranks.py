"""What the processes of a training group run; other processes can import this file by its name."""

from __future__ import annotations


def small_model(seed=0, **settings):
    import torch

    from gvdepth import GVDepth, GVDepthConfig

    torch.manual_seed(seed)
    return GVDepth(
        GVDepthConfig.tiny(encoder_widths=(8, 8), head_widths=(4,), decoder_widths=(8,), **settings)
    )


def views(count=2, seed=0):
    """Two views of some images; the second image has few valid pixels, so that ranks count differently."""
    import torch

    from gvdepth.data import RIGS

    made = torch.Generator().manual_seed(seed)
    found = []
    for height, width in ((32, 40), (48, 60)):
        labels = torch.rand(count, height, width, generator=made, dtype=torch.float64) * 60 + 1
        labels[1::2, 5:] = 0
        found.append(
            {
                "pixel_values": torch.rand(count, 3, height, width, generator=made, dtype=torch.float64),
                "camera": torch.stack([RIGS[name][0].tensor(torch.float64) for name in "AD" * (count // 2)]),
                "labels": labels,
                "view": torch.tensor([[0.0, 0, 80, 64, width, height, 0]] * count, dtype=torch.float64),
            }
        )
    return found


def gradients(rank=None, consistency=0.1):
    """The gradients of one step: of the rank's image, averaged over ranks; or of the whole batch."""
    from torch.nn.parallel import DistributedDataParallel

    from gvdepth.train import train_step

    model = small_model().double()
    batch = views()
    if rank is not None:
        batch = [{name: value[rank : rank + 1] for name, value in view.items()} for view in batch]
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = model
    losses = train_step(wrapped, batch, consistency_weight=consistency)
    losses["loss"].backward()
    return float(losses["loss"].detach()), {name: p.grad.numpy() for name, p in model.named_parameters()}


def recipe(**changes):
    from gvdepth.config import AugmentConfig, TrainConfig

    plain = {
        "steps": 6, "batch_size": 2, "accumulate": 2, "lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 2,
        "save_every": 2, "augment": AugmentConfig(min_height=32, max_height=48, pitch_deg=1.0),
    }  # fmt: skip
    return TrainConfig(**(plain | changes))


def train(out, resume=False, progress=False, slow=0.0, **changes):
    import time

    from gvdepth.data import Simulated
    from gvdepth.train import Trainer

    class Slow(Simulated):
        def __getitem__(self, index):
            time.sleep(slow)
            return super().__getitem__(index)

    samples = Slow("train", 5, seed=3, keep=True)
    trainer = Trainer(
        small_model(), samples, recipe(**changes), out=out, resume=resume, device="cpu", progress=progress
    )
    return trainer.fit()
