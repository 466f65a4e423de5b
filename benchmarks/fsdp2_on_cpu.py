"""accelerate's own FSDP2 preparation on CPUs, where it otherwise gives DDP without a word."""

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from ebft import EBFTTrainer


class FSDP2Trainer(EBFTTrainer):
    """Its accelerator is told that it is on GPUs with the shipped `fsdp2.yaml`; all the rest is as there."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        for state in (PartialState(), self.accelerator.state):
            state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        frozen = [network.model for network in [self.feature_network] if network] + [self.reference_model]
        for model in (self.model, *(model for model in frozen if model is not None)):
            assert all(isinstance(weight, DTensor) for weight in model.state_dict().values())
        return result
