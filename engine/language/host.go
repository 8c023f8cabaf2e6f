// The calls of the Pulumi CLI to the language host (pulumirpc.LanguageRuntimeServer).
// Behaviour follows the official host of pulumi 3.x; code generation, packing, linking and debugging are left out
// and answer "unimplemented".
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/blang/semver"

	"github.com/pulumi/pulumi/sdk/v3/go/common/util/rpcutil"
	"github.com/pulumi/pulumi/sdk/v3/go/common/version"
	pulumirpc "github.com/pulumi/pulumi/sdk/v3/proto/go"
	"github.com/pulumi/pulumi/sdk/v3/python/toolchain"
)

// reportedExit is what the executor exits with after it has told the user what went wrong.
const reportedExit = 32

// The Python SDK's own minimum.
var minimumPython = semver.MustParse("3.10.0")

type host struct {
	pulumirpc.UnimplementedLanguageRuntimeServer

	executor string                     // path of pulumi-language-python-exec
	tracing  string                     // endpoint, or empty
	watch    func(address string) error // ends this process when the engine at the address is gone

	mutex  sync.Mutex
	engine string // address of the engine, from the command line or the handshake

	running context.Context // done when the engine cancels
	cancel  context.CancelFunc
}

func newHost(executor, engine, tracing string, watch func(string) error) *host {
	running, cancel := context.WithCancel(context.Background())
	return &host{
		executor: executor, engine: engine, tracing: tracing, watch: watch, running: running, cancel: cancel,
	}
}

func (h *host) Handshake(
	_ context.Context, request *pulumirpc.LanguageHandshakeRequest,
) (*pulumirpc.LanguageHandshakeResponse, error) {
	h.mutex.Lock()
	h.engine = request.GetEngineAddress()
	h.mutex.Unlock()
	if err := h.watch(request.GetEngineAddress()); err != nil {
		return nil, fmt.Errorf("could not start health check host RPC server: %w", err)
	}
	return &pulumirpc.LanguageHandshakeResponse{}, nil
}

func (h *host) GetPluginInfo(context.Context, *emptypb.Empty) (*pulumirpc.PluginInfo, error) {
	return &pulumirpc.PluginInfo{Version: version.Version}, nil
}

// Cancel ends the programs that run.
func (h *host) Cancel(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	h.cancel()
	return &emptypb.Empty{}, nil
}

// GetRequiredPackages lists the plugins that the installed Python packages need, and makes the virtual
// environment first when it is not there yet.
func (h *host) GetRequiredPackages(
	ctx context.Context, request *pulumirpc.GetRequiredPackagesRequest,
) (*pulumirpc.GetRequiredPackagesResponse, error) {
	chain, _, err := resolve(request.GetInfo(), false)
	if err != nil {
		return nil, err
	}
	info, failure, closer, err := h.engineWriters(ctx)
	if err != nil {
		return nil, err
	}
	defer closer.Close()
	if err := chain.EnsureVenv(ctx, request.GetInfo().GetProgramDirectory(), false, true, info, failure); err != nil {
		return nil, err
	}
	warnOfOldPython(ctx, chain)

	found, err := distributions(ctx, chain)
	if err != nil {
		return nil, err
	}
	response := &pulumirpc.GetRequiredPackagesResponse{}
	for _, distribution := range found {
		needed, err := requirement(distribution)
		if err != nil {
			return nil, err
		}
		if needed != nil {
			response.Packages = append(response.Packages, needed)
		}
	}
	return response, nil
}

// warnOfOldPython writes to standard error, which the CLI shows as a diagnostic.
func warnOfOldPython(ctx context.Context, chain toolchain.Toolchain) {
	about, err := chain.About(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "Failed to resolve python version command: %s\n", err)
		return
	}
	if about.PythonVersion.LT(minimumPython) {
		fmt.Fprintf(os.Stderr, "Pulumi does not support Python %s. Please upgrade to at least %s\n",
			about.PythonVersion, minimumPython)
	}
}

// Run starts a program through the executor and waits for it.
func (h *host) Run(ctx context.Context, request *pulumirpc.RunRequest) (*pulumirpc.RunResponse, error) {
	if request.GetAttachDebugger() {
		return &pulumirpc.RunResponse{Error: "attaching a debugger is not supported by this language host"}, nil
	}
	engine, err := h.engineAddress()
	if err != nil {
		return nil, err
	}
	chain, options, err := resolve(request.GetInfo(), false)
	if err != nil {
		return nil, err
	}
	if err := chain.ValidateVenv(ctx); err != nil {
		return nil, err
	}
	if err := typecheck(ctx, chain, options); err != nil {
		return nil, err
	}
	ctx, stop := h.untilCancelled(ctx)
	defer stop()
	command, err := chain.Command(ctx, append([]string{h.executor}, arguments(request, engine, h.tracing)...)...)
	if err != nil {
		return nil, err
	}
	configuration, err := configurationEnvironment(request.GetConfig(), request.GetConfigSecretKeys())
	if err != nil {
		return nil, err
	}
	if command.Env == nil {
		command.Env = os.Environ()
	}
	command.Env = append(command.Env, configuration...)
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	// Not an interrupt: Python would answer it with a traceback, above the violation that the user has to read.
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	return outcome(command.Run()), nil
}

// outcome turns a program's end into the CLI's terms: Bail means "failed, and the user knows why".
func outcome(err error) *pulumirpc.RunResponse {
	if err == nil {
		return &pulumirpc.RunResponse{}
	}
	// A program that crashes does not flush; what it wrote must reach the engine before the answer does.
	_ = os.Stdout.Sync()
	_ = os.Stderr.Sync()
	var exit *exec.ExitError
	switch {
	case !errors.As(err, &exit):
		return &pulumirpc.RunResponse{
			Error: fmt.Sprintf("problem executing program (could not run language executor): %v", err),
		}
	case exit.ExitCode() == reportedExit:
		return &pulumirpc.RunResponse{Bail: true}
	case exit.ExitCode() > 0:
		return &pulumirpc.RunResponse{
			Error: fmt.Sprintf("program exited with non-zero exit code: %d", exit.ExitCode()),
		}
	default: // killed by a signal
		return &pulumirpc.RunResponse{Error: fmt.Sprintf("program exited unexpectedly: %v", exit)}
	}
}

// arguments are the executor's command line.
func arguments(request *pulumirpc.RunRequest, engine, tracing string) []string {
	var result []string
	for _, option := range [][2]string{
		{"monitor", request.GetMonitorAddress()},
		{"engine", engine},
		{"project", request.GetProject()},
		{"root_directory", request.GetInfo().GetRootDirectory()},
		{"stack", request.GetStack()},
		{"pwd", request.GetPwd()},
		{"dry_run", strconv.FormatBool(request.GetDryRun())},
		{"parallel", strconv.Itoa(int(request.GetParallel()))},
		{"tracing", tracing},
		{"organization", request.GetOrganization()},
	} {
		if option[1] != "" {
			result = append(result, "--"+option[0], option[1])
		}
	}
	return append(append(result, request.GetInfo().GetEntryPoint()), request.GetArgs()...)
}

// configurationEnvironment is how the Python SDK gets a stack's configuration.
func configurationEnvironment(config map[string]string, secretKeys []string) ([]string, error) {
	if secretKeys == nil {
		secretKeys = []string{}
	}
	keys, err := json.Marshal(secretKeys)
	if err != nil {
		return nil, fmt.Errorf("failed to serialize configuration secret keys: %w", err)
	}
	environment := []string{"PULUMI_CONFIG_SECRET_KEYS=" + string(keys)}
	if config == nil {
		return environment, nil
	}
	values, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("failed to serialize configuration: %w", err)
	}
	return append(environment, "PULUMI_CONFIG="+string(values)), nil
}

// typecheck runs the type checker that Pulumi.yaml names, before the program.
func typecheck(ctx context.Context, chain toolchain.Toolchain, options toolchain.PythonOptions) error {
	if options.Typechecker == toolchain.TypeCheckerNone {
		return nil
	}
	name := strings.ToLower(toolchain.TypeCheckerName(options.Typechecker))
	found, err := distributions(ctx, chain)
	if err != nil {
		return err
	}
	installed := false
	for _, distribution := range found {
		installed = installed || distribution.Name == name
	}
	if !installed {
		return fmt.Errorf("The typechecker option is set to %s, but %s is not installed. "+
			"Please add it to the program's requirements and install them again", name, name)
	}
	args := []string{}
	if options.Typechecker == toolchain.TypeCheckerMypy {
		environment, err := chain.VirtualEnvPath(ctx)
		if err != nil {
			return err
		}
		if inside, err := filepath.Rel(options.ProgramDir, environment); environment != "" && err == nil {
			args = append(args, "--exclude", inside)
		}
	}
	command, err := chain.ModuleCommand(ctx, name, append(args, options.ProgramDir)...)
	if err != nil {
		return err
	}
	command.Stdout, command.Stderr, command.Dir = os.Stdout, os.Stderr, options.ProgramDir
	if err := command.Run(); err != nil {
		return fmt.Errorf("%s failed: %w", name, err)
	}
	return nil
}

func (h *host) InstallDependencies(
	request *pulumirpc.InstallDependenciesRequest, server pulumirpc.LanguageRuntime_InstallDependenciesServer,
) error {
	chain, _, err := resolve(request.GetInfo(), request.GetIsPlugin())
	if err != nil {
		return err
	}
	closer, stdout, stderr, err := rpcutil.MakeInstallDependenciesStreams(server, request.GetIsTerminal())
	if err != nil {
		return err
	}
	defer closer.Close() // again below: the second call only repeats the first one's answer
	fmt.Fprint(stdout, "Installing dependencies...\n\n")
	err = chain.InstallDependencies(server.Context(), request.GetInfo().GetProgramDirectory(),
		request.GetUseLanguageVersionTools(), true, stdout, stderr)
	if err != nil {
		return err
	}
	fmt.Fprint(stdout, "Finished installing dependencies\n\n")
	return closer.Close()
}

func (h *host) RuntimeOptionsPrompts(
	context.Context, *pulumirpc.RuntimeOptionsRequest,
) (*pulumirpc.RuntimeOptionsResponse, error) {
	return &pulumirpc.RuntimeOptionsResponse{}, nil
}

func (h *host) About(ctx context.Context, request *pulumirpc.AboutRequest) (*pulumirpc.AboutResponse, error) {
	chain, options, err := resolve(request.GetInfo(), false)
	if err != nil {
		return nil, err
	}
	about, err := chain.About(ctx)
	if err != nil {
		return nil, err
	}
	return &pulumirpc.AboutResponse{
		Executable: about.PythonExecutable,
		Version:    about.PythonVersion.String(),
		Metadata: map[string]string{
			"toolchain":        toolchain.Name(options.Toolchain),
			"toolchainVersion": about.ToolchainVersion.String(),
			"typechecker":      toolchain.TypeCheckerName(options.Typechecker),
		},
	}, nil
}

func (h *host) GetProgramDependencies(
	ctx context.Context, request *pulumirpc.GetProgramDependenciesRequest,
) (*pulumirpc.GetProgramDependenciesResponse, error) {
	chain, _, err := resolve(request.GetInfo(), false)
	if err != nil {
		return nil, err
	}
	packages, err := chain.ListPackages(ctx, request.GetTransitiveDependencies())
	if err != nil {
		return nil, fmt.Errorf("failed to get python dependencies: %w", err)
	}
	response := &pulumirpc.GetProgramDependenciesResponse{}
	for _, found := range packages {
		response.Dependencies = append(response.Dependencies,
			&pulumirpc.DependencyInfo{Name: found.Name, Version: found.Version})
	}
	return response, nil
}

func (h *host) engineAddress() (string, error) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.engine == "" {
		return "", status.Error(codes.FailedPrecondition,
			"when debugging or running explicitly, must call Handshake before Run")
	}
	return h.engine, nil
}

// untilCancelled ends with the call, or when the engine cancels.
func (h *host) untilCancelled(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	release := context.AfterFunc(h.running, cancel)
	return ctx, func() { release(); cancel() }
}

// engineWriters show text as passing messages of the run: at info and at error level.
func (h *host) engineWriters(ctx context.Context) (io.Writer, io.Writer, io.Closer, error) {
	address, err := h.engineAddress()
	if err != nil {
		return nil, nil, nil, err
	}
	connection, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), rpcutil.GrpcChannelOptions())
	if err != nil {
		return nil, nil, nil, fmt.Errorf("language host could not make connection to engine: %w", err)
	}
	engine := pulumirpc.NewEngineClient(connection)
	return engineWriter{ctx, engine, pulumirpc.LogSeverity_INFO},
		engineWriter{ctx, engine, pulumirpc.LogSeverity_ERROR}, connection, nil
}

type engineWriter struct {
	ctx      context.Context
	engine   pulumirpc.EngineClient
	severity pulumirpc.LogSeverity
}

func (w engineWriter) Write(text []byte) (int, error) {
	_, err := w.engine.Log(w.ctx, &pulumirpc.LogRequest{
		Message: strings.ToValidUTF8(string(text), "\uFFFD"), Ephemeral: true, Severity: w.severity,
	})
	if err != nil {
		return 0, err
	}
	return len(text), nil
}
