"""METHODS: every federated system by its name."""

from graphplan.federated.method import Method
from graphplan.federated.methods.allsmall import ALLSMALL
from graphplan.federated.methods.compress_only import COMPRESS_ONLY
from graphplan.federated.methods.exclusive import EXCLUSIVE
from graphplan.federated.methods.fedavg import FEDAVG
from graphplan.federated.methods.fedhybrid import FEDHYBRID
from graphplan.federated.methods.oort_fedprox import OORT_FEDPROX
from graphplan.federated.methods.random_hybrid import RANDOM_HYBRID
from graphplan.federated.methods.recompute_only import RECOMPUTE_ONLY

METHODS: dict[str, Method] = {
    FEDHYBRID.name: FEDHYBRID,
    FEDAVG.name: FEDAVG,
    EXCLUSIVE.name: EXCLUSIVE,
    ALLSMALL.name: ALLSMALL,
    RECOMPUTE_ONLY.name: RECOMPUTE_ONLY,
    COMPRESS_ONLY.name: COMPRESS_ONLY,
    OORT_FEDPROX.name: OORT_FEDPROX,
    RANDOM_HYBRID.name: RANDOM_HYBRID,
}
