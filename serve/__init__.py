"""The last arrow of the flow, Model -> Service: a Ray Serve application that speaks OpenAI's HTTP API."""
