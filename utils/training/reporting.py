"""What a training prints and records of its epochs: the bar of one, its line, its numbers in metrics.jsonl."""

from collections.abc import Mapping

from tqdm import tqdm

from utils.images.batches import ImageData
from utils.runs.run import Run


class EpochReport:
    """Says how a training of `n_epochs` goes on, on the screen and in the files of `run`."""

    def __init__(self, run: Run, data: ImageData, *, n_epochs: int):
        self.run, self.data, self.n_epochs = run, data, n_epochs

    def progress_bar(self, epoch: int, *, done: int) -> tqdm:
        """The bar of an epoch of which `done` steps are behind; none but the main process has one, and only at a terminal."""
        description = f"epoch {epoch + 1}/{self.n_epochs}"
        disable = None if self.run.world.is_main else True  # None: quiet where stderr is no terminal
        return tqdm(total=self.data.train_steps, initial=done, desc=description, disable=disable, leave=False, unit="step")

    def epoch(
        self,
        epoch: int,
        scores: Mapping[str, Mapping[str, float]],
        *,
        lr: float,
        seconds: Mapping[str, float],
        skipped_steps: int,
        best: Mapping[str, float],
    ) -> None:
        """Records and logs an epoch that has ended: `scores` of `train` and `test`, and the `seconds` that each took.

        `skipped_steps` are those of its training that an earlier process did, which are not in `seconds`.
        """
        done = 1 - skipped_steps / self.data.train_steps
        for split, images in (("train", scores["train"]["images"] * done), ("test", scores["test"]["images"])):
            self._record(epoch, split, scores[split], lr=lr, seconds=seconds[split], images=images)
        self._log(epoch, scores["train"], scores["test"], lr=lr, seconds=sum(seconds.values()), done=done, best=best)

    def _record(self, epoch: int, split: str, values: Mapping[str, float], *, lr: float, seconds: float, images: float) -> None:
        rate = images / max(seconds, 1e-9)
        values = {name: value for name, value in values.items() if name != "images"}
        self.run.record({"epoch": epoch, "split": split, **values, "lr": lr, "seconds": seconds, "images_per_second": rate})

    def _log(
        self,
        epoch: int,
        train: Mapping[str, float],
        test: Mapping[str, float],
        *,
        lr: float,
        seconds: float,
        done: float,
        best: Mapping[str, float],
    ) -> None:
        steps = self.data.train_steps
        left = (self.n_epochs - epoch - 1) * seconds * steps / max(done * steps, 1)
        rate = done * self.data.train_images / seconds
        beside = [f"{name.partition('_')[0]} top1 {value:.2f}  " for name, value in test.items() if name.endswith("_top1")]
        self.run.log(
            f"epoch {epoch + 1}/{self.n_epochs}  lr {lr:.4g}  "
            f"train loss {train['loss']:.4f} top1 {train['top1']:.2f}  test loss {test['loss']:.4f} top1 {test['top1']:.2f} "
            f"top5 {test['top5']:.2f}  {''.join(beside)}best {best['top1']:.2f}  "
            f"{seconds:.1f} s, {rate:.0f} images/s, {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
