"""What the methods take, as a table for tests of the recipe language alone."""

from __future__ import annotations

from mergekit_lite.recipe import MethodParameters, Parameter
from mergekit_lite.recipe.document import Value

NEEDED = Parameter((float,), required=True)


def number(default: float) -> Parameter:
    return Parameter((float,), default)


def whole(default: int) -> Parameter:
    return Parameter((int,), default)


def truth(default: bool) -> Parameter:
    return Parameter((bool,), default)


def one_of(*choices: str) -> Parameter:
    return Parameter((str,), choices[0], choices=choices)


def arithmetic(normalize: bool, rescale: Value, **per_model: Parameter) -> MethodParameters:
    scaling = Parameter((bool, str), rescale, choices=("l1", "density"))
    shared = {"normalize": truth(normalize), "rescale": scaling, "lambda": number(1.0)}
    if "density" in per_model:
        shared["trim"] = one_of("tensor", "global")
    return MethodParameters(shared, {"weight": NEEDED, **per_model})


DENSITY = number(1.0)
METHODS = {
    "linear": MethodParameters({"normalize": truth(True)}, {"weight": NEEDED}, "none"),
    "slerp": MethodParameters({"t": NEEDED}, models=(1, 1)),
    "nuslerp": MethodParameters(
        {"nuslerp_flatten": truth(True), "nuslerp_row_wise": truth(False)}, {"weight": NEEDED}, "optional", (2, 2)
    ),
    "multislerp": MethodParameters(
        {"normalize_weights": truth(True), "eps": number(1e-8)}, {"weight": NEEDED}, "optional"
    ),
    "karcher": MethodParameters({"max_iter": whole(10), "tol": number(1e-5)}, {}, "none", (2, None)),
    "passthrough": MethodParameters({}, {"scale": Parameter((float,))}, "none", (1, 1)),
    "task_arithmetic": arithmetic(False, False),
    "ties": arithmetic(True, False, density=DENSITY),
    "dare_linear": arithmetic(False, True, density=DENSITY),
    "dare_ties": arithmetic(False, True, density=DENSITY),
    "della": arithmetic(True, True, density=DENSITY, epsilon=number(0.15)),
    "della_linear": arithmetic(False, True, density=DENSITY, epsilon=number(0.15)),
    "breadcrumbs": arithmetic(False, False, density=DENSITY, gamma=number(0.01)),
    "breadcrumbs_ties": arithmetic(False, False, density=DENSITY, gamma=number(0.01)),
    "model_stock": MethodParameters({"filter_wise": truth(False)}, models=(2, None)),
    "nearswap": MethodParameters({"t": NEEDED}, models=(1, 1)),
    "arcee_fusion": MethodParameters(models=(1, 1)),
    "sce": MethodParameters({"select_topk": number(1.0), "variant": one_of("mergekit", "fusechat", "paper")}),
    "ram": MethodParameters({"epsilon": number(1e-5)}),
    "ramplus_tl": MethodParameters({"epsilon": number(1e-5), "r": number(0.1), "alpha": number(0.2)}),
    "expo": MethodParameters({"alpha": NEEDED}, models=(1, 1)),
    "varm": MethodParameters(
        {
            "granularity": one_of("tensor", "model", "layer", "module", "element"),
            "measure": one_of("square", "abs"),
            "temperature": Parameter((float,)),
        }
    ),
    "magmax": MethodParameters({"lambda": number(1.0)}),
    "consensus": MethodParameters({"lambda": number(1.0), "threshold": number(0.4), "agree": whole(2)}),
    "geometric_median": MethodParameters({"max_iter": whole(100), "tol": number(1e-6)}, {}, "none", (2, None)),
}
