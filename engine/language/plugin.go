// Plugins written in Python: policy packs, and providers in the two forms that the Python SDK knows.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/pulumi/pulumi/sdk/v3"
	"github.com/pulumi/pulumi/sdk/v3/go/common/util/rpcutil"
	pulumirpc "github.com/pulumi/pulumi/sdk/v3/proto/go"
	"github.com/pulumi/pulumi/sdk/v3/python/toolchain"
)

// analyzer is the kind of plugin that a policy pack is.
const analyzer = "analyzer"

// RunPlugin starts a plugin, streams its output (the first line is its port), and sends its exit code.
func (h *host) RunPlugin(
	request *pulumirpc.RunPluginRequest, server pulumirpc.LanguageRuntime_RunPluginServer,
) error {
	if request.GetAttachDebugger() {
		return errors.New("attaching a debugger is not supported by this language host")
	}
	ctx, stop := h.untilCancelled(server.Context())
	defer stop()
	chain, _, err := resolve(request.GetInfo(), true)
	if err != nil {
		return err
	}
	if err := chain.ValidateVenv(ctx); err != nil {
		return err
	}
	environment, err := pluginEnvironment(ctx, chain, request.GetEnv())
	if err != nil {
		return err
	}
	closer, stdout, stderr, err := rpcutil.MakeRunPluginStreams(server, false)
	if err != nil {
		return err
	}
	defer closer.Close()

	if request.GetKind() == analyzer {
		err = runPolicyPack(ctx, chain, request, environment, stdout, stderr)
	} else {
		err = runProvider(ctx, chain, request, environment, stdout, stderr)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() >= 0 {
		return server.Send(&pulumirpc.RunPluginResponse{
			Output: &pulumirpc.RunPluginResponse_Exitcode{Exitcode: int32(exit.ExitCode())},
		})
	}
	if err != nil {
		return fmt.Errorf("plugin %s: %w", request.GetInfo().GetProgramDirectory(), err)
	}
	return closer.Close()
}

// pluginEnvironment is the engine's environment with the plugin's virtual environment activated in it.
func pluginEnvironment(ctx context.Context, chain toolchain.Toolchain, engine []string) ([]string, error) {
	environment := append(os.Environ(), engine...)
	path, err := chain.VirtualEnvPath(ctx)
	if err != nil || path == "" {
		return environment, err
	}
	return toolchain.ActivateVirtualEnv(environment, path), nil
}

// runPolicyPack starts a pack once the engine has told which stack it is for. Packs read that from variables at
// their start, while the engine configures a plugin only after it serves: the proxy stands between the two.
func runPolicyPack(
	ctx context.Context, chain toolchain.Toolchain, request *pulumirpc.RunPluginRequest, environment []string,
	stdout, stderr io.Writer,
) error {
	proxy, packOutput, err := sdk.NewPolicyProxy(ctx, stdout)
	if err != nil {
		return fmt.Errorf("starting the policy proxy: %w", err)
	}
	stack, err := proxy.AwaitConfiguration(ctx)
	if err != nil {
		return fmt.Errorf("waiting for the stack's configuration: %w", err)
	}
	variables, err := stackEnvironment(stack)
	if err != nil {
		return err
	}
	pack := request.GetInfo().GetProgramDirectory()
	engine := ""
	if len(request.GetArgs()) > 0 {
		engine = request.GetArgs()[0]
	}
	// -u: the port must not wait in a buffer. The pack is started in its own folder, as `.`.
	command, err := chain.Command(ctx, "-u", "-m", "pulumi.policy", engine, ".")
	if err != nil {
		return err
	}
	command.Dir = pack
	command.Env = append(environment, variables...)
	command.Stdout, command.Stderr = packOutput, stderr
	if err := command.Start(); err != nil {
		return fmt.Errorf("starting the policy pack: %w", err)
	}
	return proxy.Attach(ctx, command)
}

// stackEnvironment is what a pack reads about the stack; without a stack (`pulumi policy publish`) it is empty.
func stackEnvironment(stack *pulumirpc.AnalyzerStackConfigureRequest) ([]string, error) {
	if stack == nil {
		return nil, nil
	}
	environment, err := configurationEnvironment(stack.GetConfig(), stack.GetConfigSecretKeys())
	if err != nil {
		return nil, err
	}
	for _, variable := range [][2]string{
		{"PULUMI_ORGANIZATION", stack.GetOrganization()},
		{"PULUMI_PROJECT", stack.GetProject()},
		{"PULUMI_STACK", stack.GetStack()},
		{"PULUMI_DRY_RUN", strconv.FormatBool(stack.GetDryRun())},
	} {
		if variable[1] != "" {
			environment = append(environment, variable[0]+"="+variable[1])
		}
	}
	return environment, nil
}

// runProvider runs a folder with __main__.py as a program, else a buildable package through pulumi.run.plugin.
func runProvider(
	ctx context.Context, chain toolchain.Toolchain, request *pulumirpc.RunPluginRequest, environment []string,
	stdout, stderr io.Writer,
) error {
	args, err := providerArguments(request)
	if err != nil {
		return err
	}
	command, err := chain.Command(ctx, args...)
	if err != nil {
		return err
	}
	command.Dir, command.Env = request.GetPwd(), environment
	command.Stdout, command.Stderr = stdout, stderr
	return command.Run()
}

func providerArguments(request *pulumirpc.RunPluginRequest) ([]string, error) {
	root, program := request.GetInfo().GetRootDirectory(), request.GetInfo().GetProgramDirectory()
	_, err := os.Stat(filepath.Join(program, "__main__.py"))
	if err == nil {
		return append([]string{program}, request.GetArgs()...), nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("looking for __main__.py: %w", err)
	}
	buildable, err := toolchain.IsBuildablePackage(root)
	if err != nil {
		return nil, fmt.Errorf("checking if plugin is a buildable package: %w", err)
	}
	if !buildable {
		return nil, errors.New("plugin is not runnable, it provides neither __main__.py nor a buildable pyproject.toml")
	}
	described, err := toolchain.LoadPyproject(root)
	if err != nil {
		return nil, fmt.Errorf("loading pyproject: %w", err)
	}
	return append([]string{"-m", "pulumi.run.plugin", described.Project.Name}, request.GetArgs()...), nil
}
