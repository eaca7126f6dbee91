"""A batch: its rows, pieces of it, the call of the model with it, its loss and what that loss is a mean over."""

from lorafamily.batch.containers import fingerprint, refuse_one_batch, to_device
from lorafamily.batch.loss import IGNORED, LossFn, LossOver, call, loss_of, loss_weight, weigher
from lorafamily.batch.rows import batch_axes, cut_rows, first_rows, gather_rows, rows_in, share

__all__ = ["batch_axes", "cut_rows", "first_rows", "gather_rows", "rows_in", "share"]
__all__ += ["fingerprint", "refuse_one_batch", "to_device"]
__all__ += ["IGNORED", "LossFn", "LossOver", "call", "loss_of", "loss_weight", "weigher"]
