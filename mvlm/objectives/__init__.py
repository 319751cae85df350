"""The four objectives (MLM, MIM, ITC, ITM) as functions of tensors."""
