"""The quick start: two tools that need nothing."""

from atp_sdk.atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="YOUR_ATP_API_KEY", app_name="hello")


@client.register_tool(
    function_name="hello_world",
    params=["name"],
    required_params=["name"],
    description="Returns a greeting.",
    auth_provider=None,
    auth_type=None,
    auth_with=None,
)
def hello_world(**kwargs):
    return {"message": f"Hello, {kwargs.get('name', 'World')}!"}


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
