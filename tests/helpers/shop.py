"""A shop for tests of the server: its tools, a call, and the answers of a scripted model."""

ORDER = {
    "type": "object",
    "properties": {"order_id": {"type": "integer"}},
    "required": ["order_id"],
}
SHOP = [
    {"type": "function", "function": {"name": name, "parameters": ORDER}}
    for name in ("get_order", "cancel_order")
]
CALL = "<tool_call>get_order\n<arg_key>order_id</arg_key>\n<arg_value>123</arg_value>\n</tool_call>"


def script(prompt):
    """Return the answers of a small shop, by the last question; a prompt that forces a call is finished."""
    if prompt.endswith("<tool_call>get_order\n"):
        return CALL.removeprefix("<tool_call>get_order\n") + "<|observation|>"
    if prompt.endswith("<tool_call>"):
        return CALL.removeprefix("<tool_call>") + "<|observation|>"
    if prompt.endswith("</tool_response><|assistant|>"):
        return "\n<think>It says pending.</think>\nIt is pending.<|user|>"
    question = prompt.rsplit("<|user|>", 1)[-1]
    if "crash" in question:
        return RuntimeError("a fault on purpose")
    if "endless" in question:
        return "\n<think></think>\n" + "on and on " * 10_000
    if "broken" in question:
        return "\n<think></think>\n<tool_call>{}</tool_call><|user|>"
    if "two" in question:
        return f"\n<think></think>\n{CALL}\n{CALL}<|observation|>"
    if "order" in question:
        return f"\n<think>Look it up.</think>\nLet me see.\n{CALL}<|observation|>"
    if prompt.endswith("</think>"):
        return "\nAt once.<|user|>"
    if "<|assistant|>" not in prompt:
        return " and so on, é.<|endoftext|>"
    return "\n<think>A greeting.</think>\nHello, wörld; and more.<|user|>"
