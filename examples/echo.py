"""A tool that gives back what it was given."""

from atp_sdk.atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="YOUR_ATP_API_KEY", app_name="my_app")


@client.register_tool(
    function_name="echo",
    params=["text"],
    required_params=["text"],
    description="Echoes the input text.",
    auth_provider=None,
    auth_type=None,
    auth_with=None,
)
def echo(**kwargs):
    return {"echo": kwargs.get("text")}


client.start()
