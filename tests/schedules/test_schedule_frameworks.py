"""Schedules inside Hugging Face's Trainer and Accelerate and Lightning's Trainer, where those are installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import guided_descent as gd
from guided_descent.schedules import one_cycle, wsd

STEPS, PEAK = 12, 0.02


def factor(t):
    return (t + 1) / 3 if t < 3 else 1.0 if t < 8 else 1 - math.sqrt((t - 8) / 4)


def build(model):
    opt = gd.Muon(model, lr=PEAK)
    return opt, wsd(opt, STEPS, warmup=3, cooldown=4)


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        made = torch.Generator().manual_seed(i)
        return {"x": torch.randn(4, generator=made), "labels": torch.randn(2, generator=made)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, labels=None):
        out = self.b(torch.tanh(self.a(x)))
        return {"loss": (out - labels).square().mean(), "logits": out}


def test_the_trainer_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Watch(transformers.TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            self.seen.append(optimizer.param_groups[0]["lr"])

    def trainer(watch, build=build):
        torch.manual_seed(0)
        model = Net()
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=5,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return transformers.Trainer(
            model=model, args=options, train_dataset=Rows(), optimizers=build(model), callbacks=[watch]
        )

    expected = [PEAK * factor(t) for t in range(STEPS)]
    watch = Watch()
    straight = trainer(watch)
    straight.train()
    assert watch.seen == pytest.approx(expected, abs=1e-9)
    straight.lr_scheduler.finish()
    watch = Watch()
    resumed = trainer(watch)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert watch.seen == pytest.approx(expected[5:], abs=1e-9)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters()):
        torch.testing.assert_close(a, b)

    def cycle(model):
        opt = gd.Muon(model, lr=PEAK)
        return opt, one_cycle(opt, STEPS)

    both = trainer(Watch(), cycle)
    both.train()
    both.lr_scheduler.finish()


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    model, opt, schedule, rows = accelerator.prepare(model, *build(model), DataLoader(Rows(), batch_size=4))
    seen = []
    for batch in [*rows, *rows][: 2 * STEPS]:
        with accelerator.accumulate(model):
            before = opt.param_groups[0]["lr"]
            accelerator.backward(model(**batch)["loss"])
            opt.step()
            schedule.step()
            opt.zero_grad()
            if accelerator.sync_gradients:
                seen.append(before)
    assert seen == pytest.approx([PEAK * factor(t) for t in range(len(seen))], abs=1e-9)
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    assert schedule.get_last_lr()[0] == pytest.approx(PEAK * factor(min(len(seen), STEPS - 1)))


@pytest.mark.parametrize("kind", ["wsd", "one_cycle"])
def test_the_trainer_of_lightning(tmp_path, kind):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = Net(), []

        def training_step(self, batch, index):
            x, y = batch
            self.seen.append(self.optimizers().param_groups[0]["lr"])
            return self.net(x, y)["loss"]

        def configure_optimizers(self):
            opt, schedule = build(self.net)
            if kind == "one_cycle":
                schedule = one_cycle(opt, STEPS)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(module, steps, path=None):
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        data = TensorDataset(torch.randn(128, 4), torch.randn(128, 2))
        trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=path)
        return trainer

    torch.manual_seed(0)
    module = Module()
    trainer = fit(module, STEPS)
    trainer.lr_scheduler_configs[0].scheduler.finish()
    if kind == "wsd":
        assert module.seen == pytest.approx([PEAK * factor(t) for t in range(STEPS)], abs=1e-9)
    half, again = Module(), Module()
    fit(half, 5).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(again, STEPS, str(tmp_path / "half.ckpt"))
    trainer.lr_scheduler_configs[0].scheduler.finish()
    assert half.seen + again.seen == pytest.approx(module.seen, abs=1e-12)
