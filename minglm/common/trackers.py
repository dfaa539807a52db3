"""The log's numbers in TensorBoard or Weights & Biases, for those who watch a run there (no counterpart in the paper).

Reports and figures are made from the JSON-lines log alone. A writer is called with the same records as they are
written, and passes on their numbers under STAGE/.../NAME, at the step of the record. Its packages are optional:
`pip install 'minglm[log]'`.

Simplified: what a resumed run does again is sent again, since the services cannot cut a log back; TensorBoard shows it
as a second line of the same stage, Weights & Biases as a second run.
"""

WORDS = ("stage", "source", "env", "thinking", "when")  # say which of many records this is
LABELS = {"needle": ("length", "depth")}  # so do these numbers


def scalars(kind, record):
    """{name: number} of a log record: STAGE/.../kind/.../name; a list gives one number for each element."""
    labels, found = LABELS.get(kind, ()), {}
    path = "/".join(
        str(part)
        for part in (*map(record.get, WORDS), kind, *map(record.get, labels))
        if part is not None
    )
    for key, value in record.items():
        if key in (*WORDS, *labels, "step"):
            continue
        for i, number in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[f"{path}/{key}" + (f"/{i}" if isinstance(value, list) else "")] = number
    return found


def writer(name, folder, about):
    """A function (kind, record) that passes numbers on to `name`, "tensorboard" (files under `folder`) or "wandb".

    None for an empty name. about: the resolved config as plain values. Raises ValueError where the package is missing.
    """
    if not name:
        return None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(folder))

            def send(found, step):
                for key, value in found.items():
                    board.add_scalar(key, value, step)
                board.flush()
        else:
            import wandb

            run = wandb.init(project="minglm", name=about["name"], dir=str(folder), config=about)

            def send(found, step):
                run.log(found | {"step": step})
    except ImportError:
        raise ValueError(f"watch = {name!r} needs a package: pip install 'minglm[log]'") from None

    def write(kind, record):
        if found := scalars(kind, record):
            send(found, record.get("step", 0))

    return write
