// Package remote runs commands on other machines over SSH (command:remote:Command).
package remote

import (
	"context"

	"github.com/pulumi/pulumi-go-provider/infer"
	"github.com/pulumi/pulumi/sdk/v3/go/common/resource"

	"bulkhead/engine/command/lifecycle"
)

// Command is the resource.
type Command struct{}

// Inputs of a remote command.
type Inputs struct {
	lifecycle.Inputs
	Connection *Connection `pulumi:"connection" provider:"secret"`
}

// State is the inputs with what the last command wrote.
type State struct {
	Inputs
	lifecycle.Outputs
}

// Annotate gives defaults.
func (i *Inputs) Annotate(a infer.Annotator) { i.Inputs.Annotate(a) }

// Check refuses inputs that a remote command does not have.
func (Command) Check(ctx context.Context, request infer.CheckRequest) (infer.CheckResponse[Inputs], error) {
	inputs, failures, err := infer.DefaultCheck[Inputs](ctx, request.NewInputs)
	known := append(lifecycle.Names(), "connection")
	failures = append(failures, lifecycle.Unknown("", request.NewInputs, known...)...)
	failures = append(failures, lifecycle.CheckLogging(request.NewInputs)...)
	if connection := request.NewInputs.Get("connection"); connection.IsMap() {
		failures = append(failures, lifecycle.Unknown("connection.", connection.AsMap(), append(endpointNames, "proxy")...)...)
		if proxy := connection.AsMap().Get("proxy"); proxy.IsMap() {
			failures = append(failures, lifecycle.Unknown("connection.proxy.", proxy.AsMap(), endpointNames...)...)
		}
	}
	return infer.CheckResponse[Inputs]{Inputs: inputs, Failures: failures}, err
}

// Create runs `create`, if there is one.
func (Command) Create(
	ctx context.Context, request infer.CreateRequest[Inputs],
) (infer.CreateResponse[State], error) {
	id, err := resource.NewUniqueHex(request.Name, 8, 0)
	response := infer.CreateResponse[State]{ID: id, Output: State{Inputs: request.Inputs}}
	if err != nil || request.DryRun {
		return response, err
	}
	return response, run(ctx, request.Inputs.Create, &response.Output)
}

// Update runs `update`, else `create`.
func (Command) Update(
	ctx context.Context, request infer.UpdateRequest[Inputs, State],
) (infer.UpdateResponse[State], error) {
	response := infer.UpdateResponse[State]{Output: State{Inputs: request.Inputs, Outputs: request.State.Outputs}}
	if request.DryRun {
		return response, nil
	}
	return response, run(ctx, request.Inputs.OnUpdate(), &response.Output)
}

// Delete runs `delete`, if there is one.
func (Command) Delete(ctx context.Context, request infer.DeleteRequest[State]) (infer.DeleteResponse, error) {
	return infer.DeleteResponse{}, run(ctx, request.State.Delete, &request.State)
}
