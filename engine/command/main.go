// pulumi-resource-command: commands as resources, on this machine (command:local:Command) and over SSH
// (command:remote:Command), with the inputs and outputs that the Python package pulumi_command 1.2.1 declares.
package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	p "github.com/pulumi/pulumi-go-provider"
	"github.com/pulumi/pulumi-go-provider/infer"

	"bulkhead/engine/command/lifecycle"
	"bulkhead/engine/command/local"
	"bulkhead/engine/command/remote"
)

const (
	packageName    = "command"
	packageVersion = "1.2.1"
)

func main() {
	provider, err := newProvider()
	if err == nil {
		err = provider.Run(context.Background(), packageName, packageVersion)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// newProvider has these two resources; any other resource and every function is an error.
func newProvider() (p.Provider, error) {
	provider, err := infer.NewProviderBuilder().
		WithResources(infer.Resource(local.Command{}), infer.Resource(remote.Command{})).
		Build()
	if err != nil {
		return p.Provider{}, err
	}
	provider.Invoke = func(_ context.Context, request p.InvokeRequest) (p.InvokeResponse, error) {
		return p.InvokeResponse{}, fmt.Errorf("%s is not among what this provider does: it has the resources "+
			"command:local:Command and command:remote:Command", request.Token)
	}
	return replacingOnTriggers(hidingSecrets(provider)), nil
}

// replacingOnTriggers makes a change of any element of `triggers` a replacement: infer looks at the whole list only.
func replacingOnTriggers(provider p.Provider) p.Provider {
	replacing := map[p.DiffKind]p.DiffKind{
		p.Add: p.AddReplace, p.Delete: p.DeleteReplace, p.Update: p.UpdateReplace,
	}
	diff := provider.Diff
	provider.Diff = func(ctx context.Context, request p.DiffRequest) (p.DiffResponse, error) {
		response, err := diff(ctx, request)
		for path, change := range response.DetailedDiff {
			if kind, ok := replacing[change.Kind]; ok && (path == "triggers" || strings.HasPrefix(path, "triggers[")) {
				change.Kind = kind
				response.DetailedDiff[path] = change
			}
		}
		return response, err
	}
	return provider
}

// hidingSecrets notes which values are secret before they are decoded into plain strings, and keeps what a command
// made of them secret.
func hidingSecrets(provider p.Provider) p.Provider {
	create, update, remove := provider.Create, provider.Update, provider.Delete
	provider.Create = func(ctx context.Context, request p.CreateRequest) (p.CreateResponse, error) {
		response, err := create(lifecycle.WithSecrets(ctx, request.Properties), request)
		response.Properties = lifecycle.KeepSecret(response.Properties, request.Properties)
		return response, err
	}
	provider.Update = func(ctx context.Context, request p.UpdateRequest) (p.UpdateResponse, error) {
		response, err := update(lifecycle.WithSecrets(ctx, request.State, request.Inputs), request)
		response.Properties = lifecycle.KeepSecret(response.Properties, request.Inputs, request.State)
		return response, err
	}
	provider.Delete = func(ctx context.Context, request p.DeleteRequest) error {
		return remove(lifecycle.WithSecrets(ctx, request.Properties), request)
	}
	return provider
}
