"""Fine-tune a small transformer with the Trainer of Hugging Face; a tenth of its weights, chosen anew every epoch."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import sparse_bwd as sb
from sparse_bwd.training.hugging_face import PolicyCallback


class Parity(torch.utils.data.Dataset):
    """Sentences of 16 random words; the class is whether word 7 occurs."""

    def __init__(self, count: int = 64) -> None:
        self.words = torch.randint(2, 20, (count, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = self.words[index]
        return {"input_ids": words, "labels": (words == 7).any().long()}


torch.manual_seed(0)
config = BertConfig(
    vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
model = BertForSequenceClassification(config)  # from_pretrained(...) for a real run
for parameter in model.bert.embeddings.parameters():
    parameter.requires_grad_(False)
print(sb.convert(model, always_train=["classifier"]))
data = Parity()
probe = {"input_ids": data.words[:8]}
policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.1), probe)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=3, per_device_train_batch_size=16, learning_rate=1e-3,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    callback = PolicyCallback(policy, trainer)
    trainer.add_callback(callback)
    trainer.train()

for row in callback.history:
    print(row)
sb.restore(model)  # plain layers again: model.save_pretrained(...) as ever
