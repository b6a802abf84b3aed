"""The command line: a parser, which flags count, the flags of each component and the settings they make, how a script ends.

No more is imported here than flags need, which is why `--help` and a mistyped flag answer at once; what trains is imported by the
entry scripts once the flags are known. A new flag of a component is an `add_argument` in its `add_..._flags` and a field of the
same name in its settings; one that counts only beside others also a `counts_only`.
"""

from utils.cli.effects import flag_of, typed
from utils.cli.exits import execute, run_script
from utils.cli.flags import (
    PLACES,
    add_averaging_flags,
    add_config_flag,
    add_data_flags,
    add_recipe_flag,
    add_run_flags,
    add_training_flags,
    session_settings,
    settings_of,
)
from utils.cli.parser import Parser, counts_in_training, names_of, require
from utils.cli.resumption import flags_of, parse_flags
from utils.cli.values import (
    checked,
    keep_proportion,
    network_path,
    non_negative_float,
    non_negative_int,
    option_kind,
    positive_float,
    positive_int,
    proportion,
)

__all__ = [
    "PLACES",
    "Parser",
    "add_averaging_flags",
    "add_config_flag",
    "add_data_flags",
    "add_recipe_flag",
    "add_run_flags",
    "add_training_flags",
    "checked",
    "counts_in_training",
    "execute",
    "flag_of",
    "flags_of",
    "keep_proportion",
    "names_of",
    "network_path",
    "non_negative_float",
    "non_negative_int",
    "option_kind",
    "parse_flags",
    "positive_float",
    "positive_int",
    "proportion",
    "require",
    "run_script",
    "session_settings",
    "settings_of",
    "typed",
]
