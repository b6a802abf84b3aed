import pytest

from reporting.naming import flag_label, method_label, model_label

PRUNED = {"script": "pruning.py", "prune_mode": "filter-a", "prune_rates": [0.6], "distill": ["none"], "alpha": 0.9}
QUANTIZED = {"script": "quantize_encode.py", "quan_mode": "conv-quan", "quan_bits": 5}


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"script": "initial_train.py"}, "unpruned"),
        ({"script": "initial_train.py", "pretrained": True}, "unpruned, pre-trained"),
        (PRUNED, "PFEC, 0.6"),
        ({**PRUNED, "soft_prune": True}, "SFP (L1), 0.6"),
        ({**PRUNED, "prune_mode": "filter-l2", "soft_prune": True}, "SFP, 0.6"),
        (
            {**PRUNED, "prune_mode": "filter-l2", "soft_prune": True, "recalibrate_bn": 25},
            "SFP, 0.6, BN recalibrated over 25 batches",
        ),
        ({**PRUNED, "channel_multiple": 8, "recalibrate_bn": 1}, "PFEC, 0.6, multiple of 8, BN recalibrated over 1 batch"),
        ({**PRUNED, "prune_mode": "filter-gm"}, "FPGM, 0.6"),
        ({**PRUNED, "prune_mode": "filter-nggm", "distill": ["hap"]}, "NGGM + HAP + KD, 0.6"),
        ({**PRUNED, "prune_mode": "filter-nggm", "distill": ["hap"], "alpha": 0.0}, "NGGM + HAP, 0.6"),
        ({**PRUNED, "prune_mode": "filter-taylor"}, "Taylor, 0.6"),
        ({**PRUNED, "prune_mode": "filter-bn"}, "BN scale, 0.6"),
        ({**PRUNED, "prune_mode": "filter-r", "distill": ["kd"]}, "Random + KD, 0.6"),
        ({**PRUNED, "prune_mode": "filter-new", "distill": ["at", "sp"]}, "filter-new + AT + SP + KD, 0.6"),
        ({**PRUNED, "prune_rates": [0.5, 0.8, 1.0]}, "PFEC, 0.5 to 1 by layer"),
        ({**PRUNED, "channel_multiple": 8}, "PFEC, 0.6, multiple of 8"),
        ({**PRUNED, "channel_multiple": "auto"}, "PFEC, 0.6, best multiple"),
        ({**PRUNED, "prune_rates": ["sensitivity.json"]}, "PFEC, by sensitivity"),
        ({"script": "initial_train.py", "load_path": None}, "unpruned"),
        ({"script": "initial_train.py", "load_path n_epochs": 12}, "unpruned, trained on"),
        ({"script": "initial_train.py", "load_path": "net.pt"}, "unpruned, trained on"),
        ({**PRUNED, "prune_rates": [1.0], "distill": ["hap"]}, "unpruned + HAP + KD"),
        ({**PRUNED, "s_copy_t": False, "s_path": None}, "PFEC, 0.6, from new weights"),
        ({**PRUNED, "s_copy_t": False, "s_path n_epochs": 12}, "PFEC, 0.6"),
        ({**PRUNED, "prune_rates": [1.0], "budget": "macs=0.5", "s_copy_t": True}, "PFEC, macs=0.5"),
        ({**PRUNED, "distill": ["kd"], "kd_standardize": True}, "PFEC + standardised KD, 0.6"),
        ({**PRUNED, "distill": ["hap"], "kd_standardize": True}, "PFEC + HAP + standardised KD, 0.6"),
        ({**PRUNED, "distill": ["reviewkd"], "alpha": 0.0}, "PFEC + ReviewKD, 0.6"),
        (QUANTIZED, "network, quantized (conv, 5 bits)"),
        ({**QUANTIZED, **{f"load_path {name}": value for name, value in PRUNED.items()}}, "PFEC, 0.6, quantized (conv, 5 bits)"),
    ],
)
def test_methods_have_their_papers_names(settings, label):
    assert method_label(settings) == label


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lr_drops", [0.2, 0.2], "--lr-drops 0.2 0.2"),
        ("schedule", [], "--schedule none"),
        ("compile", True, "--compile"),
        ("compile", False, "no --compile"),
        ("samp_batches", None, "--samp-batches default"),
        ("t_path n_epochs", 10, "--n-epochs 10 of --t-path"),
        ("load_path t_path seed", 1, "--seed 1 of --t-path of --load-path"),
    ],
)
def test_settings_read_as_one_types_them(name, value, text):
    assert flag_label(name, value) == text


def test_networks_have_their_papers_names():
    assert [model_label(name) for name in ("resnet56", "alexnet")] == ["ResNet-56", "AlexNet"]


def test_networks_of_others_keep_their_names():
    names = ("timm/resnet10t", "torchvision/resnet18", "/home/me/nets.py:small")
    assert [model_label(name) for name in names] == ["timm/resnet10t", "torchvision/resnet18", "nets.py:small"]
