"""Teacher and student of a pruning run, as its settings name them."""

from collections.abc import Mapping
from dataclasses import replace

from models import build_model
from models.copies import copied
from models.network_file import NetworkFile, as_dense, load_network, transferred
from prune.compact import check_zeros_of
from prune.settings import NetworkSettings
from utils.device import to_device
from utils.errors import naming
from utils.images.batches import ImageData
from utils.images.choice import Origins
from utils.images.loading import check_classes, check_images


def read_files(settings: NetworkSettings) -> dict[str, NetworkFile]:
    """The networks that are read from files, by flag, their pruned filters truly at zero."""
    return {flag: read_checked(flag, path, model) for flag, (path, model) in settings.files.items()}


def read_checked(flag: str, path: str, model: str | None) -> NetworkFile:
    """The network of a file. Raises UserError, naming its flag, where filters that it calls pruned are not zero."""
    file = load_network(path, flag=flag, model=model, model_flag=flag.replace("path", "model"))
    check_zeros_of(file, origin=f"{flag} {path}")
    return file


def images_of(settings: NetworkSettings, files: Mapping[str, NetworkFile]) -> Origins:
    """What the files say of their images, by flag and path."""
    return {f"{flag} {settings.files[flag][0]}": file.images for flag, file in files.items()}


def student_file(settings: NetworkSettings, files: Mapping[str, NetworkFile]) -> NetworkFile | None:
    """What the student starts from, unless it is new."""
    return files.get("--t-path" if settings.s_copy_t else "--s-path")


def student_name(settings: NetworkSettings, files: Mapping[str, NetworkFile]) -> str:
    """What the student's network is called."""
    file = student_file(settings, files)
    return file.model if file is not None else settings.s_model or settings.t_model


def network_names(settings: NetworkSettings, files: Mapping[str, NetworkFile]) -> str:
    """The student, and its teacher where there is one."""
    teacher = files.get("--t-path")
    return student_name(settings, files) + (f", teacher {teacher.model}" if teacher is not None else "")


def build_networks(
    settings: NetworkSettings, files: Mapping[str, NetworkFile], data: ImageData, *, any_teacher: bool = False
) -> tuple[NetworkFile | None, NetworkFile]:
    """Teacher, if there is one, and student, on the device, fit for the dataset; `any_teacher` may know other classes.

    A teacher that the student copies gets a new classifier where it knows other ones.
    """
    files, classes = dict(files), len(data.dataset.classes)
    for flag, file in files.items():
        origin = f"{flag} {settings.files[flag][0]}"
        if any_teacher and flag == "--t-path":
            continue
        if settings.s_copy_t and file.num_classes != classes:
            with naming(origin):
                files[flag] = file = transferred(file, num_classes=classes)
        check_classes(file.num_classes, data, origin=origin, remark=file.remark)
    teacher = files.get("--t-path")
    student = student_file(settings, files)
    if student is None:
        name, num_classes = student_name(settings, files), len(data.dataset.classes)
        student = NetworkFile(build_model(name, num_classes=num_classes), name, num_classes)
    elif student is teacher:
        student = replace(teacher, network=copied(teacher.network))
    student = replace(as_dense(student), images=data.dataset.images)
    for file in filter(None, (teacher, student)):
        to_device(file.network, data.device)
        check_images(file.network, data, origin=f"the {file.model}", trains=file is student, num_classes=file.num_classes)
    return teacher, student
