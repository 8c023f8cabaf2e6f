// Package local runs commands on the machine that Pulumi runs on (command:local:Command).
package local

import (
	"context"

	"github.com/pulumi/pulumi-go-provider/infer"
	"github.com/pulumi/pulumi/sdk/v3/go/common/resource"

	"bulkhead/engine/command/lifecycle"
)

// Command is the resource.
type Command struct{}

// Inputs of a local command.
type Inputs struct {
	lifecycle.Inputs
	Interpreter  *[]string `pulumi:"interpreter,optional"`
	Dir          *string   `pulumi:"dir,optional"`
	AssetPaths   *[]string `pulumi:"assetPaths,optional"`
	ArchivePaths *[]string `pulumi:"archivePaths,optional"`
}

// State is the inputs with what the last command gave.
type State struct {
	Inputs
	lifecycle.Outputs
	Assets  *map[string]*resource.Asset `pulumi:"assets,optional"`
	Archive *resource.Archive           `pulumi:"archive,optional"`
}

// Annotate gives defaults.
func (i *Inputs) Annotate(a infer.Annotator) { i.Inputs.Annotate(a) }

// Check refuses inputs that a local command does not have.
func (Command) Check(ctx context.Context, request infer.CheckRequest) (infer.CheckResponse[Inputs], error) {
	inputs, failures, err := infer.DefaultCheck[Inputs](ctx, request.NewInputs)
	known := append(lifecycle.Names(), "interpreter", "dir", "assetPaths", "archivePaths")
	failures = append(failures, lifecycle.Unknown("", request.NewInputs, known...)...)
	failures = append(failures, lifecycle.CheckLogging(request.NewInputs)...)
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
	state := request.State
	state.Inputs = request.Inputs
	response := infer.UpdateResponse[State]{Output: state}
	if request.DryRun {
		return response, nil
	}
	return response, run(ctx, request.Inputs.OnUpdate(), &response.Output)
}

// Delete runs `delete`, if there is one.
func (Command) Delete(ctx context.Context, request infer.DeleteRequest[State]) (infer.DeleteResponse, error) {
	return infer.DeleteResponse{}, run(ctx, request.State.Delete, &request.State)
}
