"""The error for what a deferred table cannot do: which operation, on which table, at which of the user's
lines, and the remedy."""

import os
import sys

import torch

from adaloader.deferred.init_program import DeferredInitError, InitProgram

_OUR_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_FOLDERS_NOT_THE_USERS = (os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, _OUR_FOLDER + os.sep)


def refusal(operation: str, program: InitProgram, initialises: bool, reason: str = "") -> DeferredInitError:
    """Build the error. `initialises`: the operation was meant to give the table its values, rather than to
    use them."""
    initialiser = initialiser_in_progress()
    table = f"the deferred table {list(program.shape)} declared at {program.where}"
    if initialiser and not operation.endswith(initialiser):
        operation = f"torch.nn.init.{initialiser} (in {operation})"
    manage = "construct AdaLoader(model=model, ...) before the model runs"
    if initialiser or initialises:
        problem = f"{operation} at {user_line()} cannot be done row by row on {table}"
        remedy = (
            "Initialise it with what is random per element or constant (nn.init.normal_, uniform_, "
            "trunc_normal_, xavier_*, kaiming_*, constant_, scaling), create it outside deferred_init, "
            f"or set min_rows above {program.shape[0]}"
        )
        if not initialiser:
            remedy += f"; if the model was to run here, {manage}"
    else:
        problem = f"{operation} at {user_line()} needs values of {table}, which has none before a loader manages it"
        remedy = f"Please {manage}"
    return DeferredInitError(f"{problem}{f' ({reason})' if reason else ''}. {remedy}.")


def user_line() -> str:
    """Return file:line of the innermost frame that belongs neither to torch nor to this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_FOLDERS_NOT_THE_USERS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def initialiser_in_progress() -> str:
    """Return the name of the torch.nn.init function that is running, the outermost of a nest, or an empty
    string."""
    found, frame = "", sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.nn.init":
            found = frame.f_code.co_name
        elif found:
            break
        frame = frame.f_back
    return found
