"""The shop of `training.py` as a LightningModule, for tests; import it where Lightning is installed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from tests.training import OPTIMIZERS, Shop


class ShopModule(LightningModule):
    """Notes its losses; its optimizer is made with it, so that a loader can be given it."""

    def __init__(self, *, schedules: bool = False):
        super().__init__()
        self.net = Shop()
        self.losses: list[float] = []
        self.validations: list[float] = []
        self.schedules = schedules
        self.optimizer = OPTIMIZERS["adagrad"](self.net.parameters())

    def loss(self, batch) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch), batch["label"])

    def training_step(self, batch, number):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, number):
        self.validations.append(self.loss(batch).item())

    def predict_step(self, batch, number):
        return self.net(batch)

    def configure_optimizers(self):
        if not self.schedules:
            return self.optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.7)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ManualModule(ShopModule):
    """Calls backward and step itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()
        self.losses.append(loss.item())


def make_trainer(**options) -> Trainer:
    """Return a trainer on one CPU that says nothing and, unless asked, writes nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet["enable_model_summary"] = False
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 2, **quiet, **options})
