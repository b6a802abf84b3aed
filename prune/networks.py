"""Teacher and student of a pruning run, as its flags name them."""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import replace

from models import build_model
from models.network_file import NetworkFile, as_dense, load_network
from prune.compact import check_pruned_zeros
from utils.errors import naming
from utils.images.batches import ImageData
from utils.training import setup


def read_files(args: argparse.Namespace) -> dict[str, NetworkFile]:
    """The networks of --t-path and --s-path, by flag, their pruned filters truly at zero."""
    files = {}
    for flag, model in (("--t-path", args.t_model), ("--s-path", args.s_model)):
        if path_of(args, flag) is not None:
            files[flag] = read_checked(flag, path_of(args, flag), model)
    return files


def path_of(args: argparse.Namespace, flag: str) -> str | None:
    return args.t_path if flag == "--t-path" else args.s_path


def read_checked(flag: str, path: str, model: str | None) -> NetworkFile:
    file = load_network(path, flag=flag, model=model, model_flag=flag.replace("path", "model"))
    if not file.compact:
        with naming(f"{flag} {path}"):
            check_pruned_zeros(file.network.state_dict(), file.kept)
    return file


def student_file(args: argparse.Namespace, files: Mapping[str, NetworkFile]) -> NetworkFile | None:
    """What the student starts from, unless it is new."""
    return files.get("--t-path" if args.s_copy_t else "--s-path")


def student_name(args: argparse.Namespace, files: Mapping[str, NetworkFile]) -> str:
    file = student_file(args, files)
    return file.model if file is not None else args.s_model or args.t_model


def network_names(args: argparse.Namespace, files: Mapping[str, NetworkFile]) -> str:
    """The student, and its teacher where there is one."""
    teacher = files.get("--t-path")
    return student_name(args, files) + (f", teacher {teacher.model}" if teacher is not None else "")


def build_networks(
    args: argparse.Namespace, files: Mapping[str, NetworkFile], data: ImageData
) -> tuple[NetworkFile | None, NetworkFile]:
    """Teacher, if there is one, and student, on the device, fit for the dataset."""
    for flag, file in files.items():
        setup.check_classes(file.num_classes, data, origin=f"{flag} {path_of(args, flag)}")
    teacher = files.get("--t-path")
    student = student_file(args, files)
    if student is None:
        name, num_classes = student_name(args, files), len(data.dataset.classes)
        student = NetworkFile(build_model(name, num_classes=num_classes), name, num_classes)
    elif student is teacher:
        student = replace(teacher, network=copy.deepcopy(teacher.network))
    student = replace(as_dense(student), images=data.dataset.images)
    for file in filter(None, (teacher, student)):
        setup.to_device(file.network, data.device)
        setup.check_images(file.network, data, origin=f"the {file.model}", trains=file is student)
    return teacher, student
