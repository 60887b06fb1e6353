"""Lightning: configure_optimizers, its scheduler, clipping, accumulation, checkpoints."""

import warnings

import pytest
import torch
from torch import nn

import orthdion

lightning = pytest.importorskip("lightning", reason="needs lightning")


class Module(lightning.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))
        self.losses, self.norms, self.rates = [], [], []

    def configure_optimizers(self):
        optimizer = orthdion.create("completed-dion", self, lr=0.05, scalar_lr=0.02, rank_fraction=0.5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, index):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))
        self.rates.append([g["lr"] for g in optimizer.param_groups])


def batches(count, size=8):
    made = torch.Generator().manual_seed(5)
    x = torch.randn(count * size, 6, generator=made)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :2].sin()), batch_size=size)


def fit(folder, module, checkpoint=None, size=8, **options):
    known = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    known |= {"enable_model_summary": False, "default_root_dir": str(folder), "enable_checkpointing": False}
    trainer = lightning.Trainer(**(known | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on workers of loaders, and on loading inside an epoch
        trainer.fit(
            module, batches(16 * 8 // size, size), ckpt_path=checkpoint, weights_only=True if checkpoint else None
        )
    return trainer


def test_one_optimizer_keeps_automatic_optimization_and_the_schedule(tmp_path):
    module = Module()
    trainer = fit(tmp_path, module, max_epochs=6)
    assert module.automatic_optimization and type(trainer.optimizers[0]) is orthdion.CompletedDion
    assert module.losses[-1] < 0.3 * module.losses[0]
    assert sorted(set(module.rates[0])) == [0.02, 0.05] and max(module.rates[19]) < 0.001
    assert all(max(r) / min(r) == pytest.approx(2.5) for r in module.rates[:19])


def test_gradients_are_clipped(tmp_path):
    module = Module()
    fit(tmp_path, module, max_epochs=1, gradient_clip_val=0.05)

    class Watched(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            self.clipped = [float(nn.utils.get_total_norm([p.grad for p in self.parameters()]))]

    watched = Watched()
    fit(tmp_path, watched, max_epochs=1, gradient_clip_val=0.05)
    assert max(module.norms) > 0.05 and max(watched.clipped) <= 0.0501
    plain = Module()
    fit(tmp_path, plain, max_epochs=1)
    assert not torch.equal(plain.net[0].bias, module.net[0].bias)


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path):
    small, large = Module(), Module()
    first = fit(tmp_path, small, max_epochs=1, accumulate_grad_batches=2)
    second = fit(tmp_path, large, max_epochs=1, size=16)
    assert first.global_step == second.global_step == 8
    assert {g["step"] for t in (first, second) for g in t.optimizers[0].param_groups} == {8}
    for p, q in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path):
    whole, broken, again = Module(), Module(), Module(seed=9)
    end = fit(tmp_path, whole, max_epochs=4)
    trainer = fit(tmp_path, broken, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = fit(tmp_path, again, checkpoint=str(tmp_path / "saved.ckpt"), max_epochs=4)
    assert again.losses == whole.losses[32:] and len(again.losses) == 32
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    states, others = (t.optimizers[0].state_dict() for t in (end, resumed))
    assert states["param_groups"] == others["param_groups"]
    assert all(torch.equal(t, others["state"][i][k]) for i, s in states["state"].items() for k, t in s.items())
