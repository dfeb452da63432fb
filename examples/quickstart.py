"""The smallest toolkit: one tool that needs nothing."""

from atp_sdk.atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="YOUR_ATP_API_KEY", app_name="my_app")


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


client.start()
