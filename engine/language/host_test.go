// The language host as the CLI uses it: over gRPC, with real Python programs in a real virtual environment.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	pulumirpc "github.com/pulumi/pulumi/sdk/v3/proto/go"
)

// recorder gives what the program at hand saw of its call.
const recorder = `
import json, os, sys
arguments = sys.argv[1:]
record = {"arguments": arguments, "environment": dict(os.environ), "prefix": sys.prefix}
json.dump(record, open(os.environ["RECORD"], "w"))
sys.exit(int(os.environ.get("EXIT", "0")))
`

// client is a language host that serves, with an executor that records.
func client(t *testing.T, executor string) pulumirpc.LanguageRuntimeClient {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := grpc.NewServer()
	language := newHost(executor, "", "", func(string) error { return nil })
	pulumirpc.RegisterLanguageRuntimeServer(server, language)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	connection, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { connection.Close() })
	return pulumirpc.NewLanguageRuntimeClient(connection)
}

// engine takes the log messages of a language host.
type engine struct {
	pulumirpc.UnimplementedEngineServer
	mutex sync.Mutex
	text  strings.Builder
}

func (e *engine) Log(_ context.Context, request *pulumirpc.LogRequest) (*emptypb.Empty, error) {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	e.text.WriteString(request.GetMessage())
	return &emptypb.Empty{}, nil
}

func connected(t *testing.T, executor string) pulumirpc.LanguageRuntimeClient {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := grpc.NewServer()
	pulumirpc.RegisterEngineServer(server, &engine{})
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	c := client(t, executor)
	_, err = c.Handshake(context.Background(), &pulumirpc.LanguageHandshakeRequest{EngineAddress: listener.Addr().String()})
	require.NoError(t, err)
	return c
}

// venv makes a virtual environment without pip, in a folder of its own.
func venv(t *testing.T, folder string) string {
	t.Helper()
	path := filepath.Join(folder, "venv")
	text, err := exec.Command("python3", "-m", "venv", "--without-pip", path).CombinedOutput()
	require.NoError(t, err, string(text))
	return path
}

// distributionIn puts an installed Python package into a virtual environment.
func distributionIn(t *testing.T, environment, name, version, plugin string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(environment, "lib", "python3*", "site-packages"))
	require.NoError(t, err)
	require.Len(t, found, 1)
	module := strings.ReplaceAll(name, "-", "_")
	info := filepath.Join(found[0], module+"-"+version+".dist-info")
	require.NoError(t, os.MkdirAll(info, 0o755))
	write(t, filepath.Join(info, "METADATA"), fmt.Sprintf("Metadata-Version: 2.1\nName: %s\nVersion: %s\n", name, version))
	require.NoError(t, os.MkdirAll(filepath.Join(found[0], module), 0o755))
	if plugin != "" {
		write(t, filepath.Join(found[0], module, "pulumi-plugin.json"), plugin)
	}
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

func program(t *testing.T, folder string, options map[string]any) *pulumirpc.ProgramInfo {
	t.Helper()
	structure, err := structpb.NewStruct(options)
	require.NoError(t, err)
	return &pulumirpc.ProgramInfo{RootDirectory: folder, ProgramDirectory: folder, EntryPoint: ".", Options: structure}
}

type record struct {
	Arguments   []string
	Environment map[string]string
	Prefix      string
}

func recorded(t *testing.T, path string) record {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	var result record
	require.NoError(t, json.Unmarshal(content, &result))
	return result
}

func TestRunGivesTheProgramItsArgumentsConfigurationAndVirtualEnvironment(t *testing.T) {
	folder := t.TempDir()
	environment := venv(t, folder)
	file := filepath.Join(folder, "record")
	t.Setenv("RECORD", file)
	response, err := connected(t, write(t, filepath.Join(folder, "executor.py"), recorder)).Run(
		context.Background(), &pulumirpc.RunRequest{
			Project: "project", Stack: "prod", Organization: "organization", Pwd: folder, Parallel: 4, DryRun: true,
			MonitorAddress: "127.0.0.1:1", Config: map[string]string{"a:b": "c"}, ConfigSecretKeys: []string{"a:b"},
			Args: []string{"more"}, Info: program(t, folder, map[string]any{"virtualenv": "venv", "toolchain": "pip"}),
		})
	require.NoError(t, err)
	assert.Empty(t, response.GetError())
	assert.False(t, response.GetBail())

	seen := recorded(t, file)
	joined := strings.Join(seen.Arguments, " ")
	for _, part := range []string{
		"--monitor 127.0.0.1:1", "--engine 127.0.0.1:", "--project project", "--root_directory " + folder, "--stack prod",
		"--pwd " + folder, "--dry_run true", "--parallel 4", "--organization organization",
	} {
		assert.Contains(t, joined, part)
	}
	assert.Equal(t, []string{".", "more"}, seen.Arguments[len(seen.Arguments)-2:])
	assert.JSONEq(t, `{"a:b":"c"}`, seen.Environment["PULUMI_CONFIG"])
	assert.JSONEq(t, `["a:b"]`, seen.Environment["PULUMI_CONFIG_SECRET_KEYS"])
	assert.Equal(t, environment, seen.Prefix)
	assert.Equal(t, environment, seen.Environment["VIRTUAL_ENV"])
	assert.True(t, strings.HasPrefix(seen.Environment["PATH"], filepath.Join(environment, "bin")+":"))
}

func TestRunPassesExitCodesOn(t *testing.T) {
	folder := t.TempDir()
	venv(t, folder)
	t.Setenv("RECORD", filepath.Join(folder, "record"))
	c := connected(t, write(t, filepath.Join(folder, "executor.py"), recorder))
	for code, expected := range map[string]*pulumirpc.RunResponse{
		"0":  {},
		"32": {Bail: true}, // the executor has told the user already
		"1":  {Error: "program exited with non-zero exit code: 1"},
		"7":  {Error: "program exited with non-zero exit code: 7"},
	} {
		t.Setenv("EXIT", code)
		response, err := c.Run(context.Background(),
			&pulumirpc.RunRequest{Info: program(t, folder, map[string]any{"virtualenv": "venv"})})
		require.NoError(t, err)
		assert.Equal(t, expected.GetBail(), response.GetBail(), code)
		assert.Equal(t, expected.GetError(), response.GetError(), code)
	}
}

func TestRunOfAProgramThatIsKilledSaysSo(t *testing.T) {
	folder := t.TempDir()
	venv(t, folder)
	executor := write(t, filepath.Join(folder, "executor.py"), "import os\nos.kill(os.getpid(), 9)\n")
	response, err := connected(t, executor).Run(context.Background(),
		&pulumirpc.RunRequest{Info: program(t, folder, map[string]any{"virtualenv": "venv"})})
	require.NoError(t, err)
	assert.Equal(t, "program exited unexpectedly: signal: killed", response.GetError())
}

func TestCancelEndsTheProgramWithoutATraceback(t *testing.T) {
	folder := t.TempDir()
	venv(t, folder)
	started := filepath.Join(folder, "started")
	executor := write(t, filepath.Join(folder, "executor.py"),
		"import time\nopen('"+started+"', 'w').close()\ntime.sleep(60)\n")
	c := connected(t, executor)
	done := make(chan *pulumirpc.RunResponse, 1)
	go func() {
		response, _ := c.Run(context.Background(),
			&pulumirpc.RunRequest{Info: program(t, folder, map[string]any{"virtualenv": "venv"})})
		done <- response
	}()
	require.Eventually(t, func() bool { _, err := os.Stat(started); return err == nil }, 10*time.Second, 10*time.Millisecond)
	_, err := c.Cancel(context.Background(), &emptypb.Empty{})
	require.NoError(t, err)
	select {
	case response := <-done:
		assert.NotEmpty(t, response.GetError())
	case <-time.After(10 * time.Second):
		t.Fatal("the program did not end")
	}
}

func TestRunWithoutHandshakeIsAnError(t *testing.T) {
	_, err := client(t, "executor").Run(context.Background(), &pulumirpc.RunRequest{})
	assert.ErrorContains(t, err, "must call Handshake before Run")
}

func TestMissingVirtualEnvironmentIsNamedWithTheCommandsThatMakeIt(t *testing.T) {
	folder := t.TempDir()
	_, err := connected(t, "executor").Run(context.Background(),
		&pulumirpc.RunRequest{Info: program(t, folder, map[string]any{"virtualenv": "missing"})})
	for _, part := range []string{`is set to "missing"`, filepath.Join(folder, "missing"), "doesn't exist", "-m venv"} {
		assert.ErrorContains(t, err, part)
	}
}

func TestRuntimeOptionsAreChecked(t *testing.T) {
	for says, options := range map[string]map[string]any{
		"virtualenv option must be a string":  {"virtualenv": 1},
		"toolchain option must be a string":   {"toolchain": true},
		"unsupported toolchain option: conda": {"toolchain": "conda"},
		"unsupported typechecker option: tsc": {"typechecker": "tsc"},
	} {
		_, err := parseOptions(program(t, "/", options))
		assert.EqualError(t, err, says)
	}
	for _, name := range []string{"pip", "poetry", "uv"} {
		_, err := parseOptions(program(t, "/", map[string]any{"toolchain": name, "another": "option"}))
		assert.NoError(t, err)
	}
}

func TestTypecheckerThatIsNotInstalledIsAnError(t *testing.T) {
	folder := t.TempDir()
	venv(t, folder)
	_, err := connected(t, "executor").Run(context.Background(), &pulumirpc.RunRequest{
		Info: program(t, folder, map[string]any{"virtualenv": "venv", "typechecker": "mypy"}),
	})
	assert.ErrorContains(t, err, "The typechecker option is set to mypy, but mypy is not installed.")
}

func TestRequiredPackagesAreThoseThatTheInstalledOnesName(t *testing.T) {
	folder := t.TempDir()
	environment := venv(t, folder)
	distributionIn(t, environment, "pulumi-docker", "5.2.0", `{"resource": true, "name": "docker", "version": "5.2.0"}`)
	distributionIn(t, environment, "third-party", "1.0.0", `{"resource": true, "name": "third", "version": "v2.0.0", "server": "https://example.org"}`)
	distributionIn(t, environment, "pulumi-without", "1.0.0", `{"resource": false}`)
	distributionIn(t, environment, "pulumi-old", "1.2rc3", "")
	distributionIn(t, environment, "pulumi-policy", "1.21.0", "")
	distributionIn(t, environment, "requests", "2.0.0", "")
	distributionIn(t, environment, "pulumi-odd", "1!2.0", "")
	// A module of the program's must not be imported instead of Python's own.
	t.Chdir(folder)
	write(t, filepath.Join(folder, "json.py"), "raise SystemExit('shadowed')")

	response, err := connected(t, "executor").GetRequiredPackages(context.Background(), &pulumirpc.GetRequiredPackagesRequest{
		Info: program(t, folder, map[string]any{"virtualenv": "venv", "toolchain": "pip"}),
	})
	require.NoError(t, err)
	var found []string
	for _, each := range response.GetPackages() {
		found = append(found, strings.TrimSpace(strings.Join([]string{each.Kind, each.Name, each.Version, each.Server}, " ")))
	}
	assert.Equal(t, []string{
		"resource docker v5.2.0", "resource old v1.2.0-rc.3", "resource third v2.0.0 https://example.org",
	}, found)
}

func TestBrokenPluginDescriptionIsAnErrorThatNamesThePackage(t *testing.T) {
	text := "{"
	_, err := requirement(distribution{Name: "pulumi-broken", Version: "1.0.0", Plugin: &text})
	assert.ErrorContains(t, err, "pulumi-plugin.json of the Python package pulumi-broken")
}

func TestPluginVersionFollowsThePythonVersion(t *testing.T) {
	for python, expected := range map[string]string{
		"1": "1.0.0", "1.0": "1.0.0", "1.2.3": "1.2.3", "1.2.3.4": "1.2.3.4",
		"1.2.3a4": "1.2.3-alpha.4", "1.2.3b4": "1.2.3-beta.4", "1.2.3rc4": "1.2.3-rc.4",
		"1.2.3.post4": "1.2.3+post4", "1.2.3.dev5": "1.2.3+dev5", "1.2.3.post4.dev5": "1.2.3+post4dev5",
		"1.2.3rc4.dev5": "1.2.3-rc.4+dev5",
	} {
		version, err := pluginVersion(python)
		require.NoError(t, err, python)
		assert.Equal(t, expected, version, python)
	}
	for _, python := range []string{"", "1!2.0", "1.2.3+local", "one", "1.2.3ä"} {
		_, err := pluginVersion(python)
		assert.Error(t, err, python)
	}
}

func TestAboutNamesThePythonOfTheVirtualEnvironment(t *testing.T) {
	folder := t.TempDir()
	environment := venv(t, folder)
	about, err := client(t, "executor").About(context.Background(),
		&pulumirpc.AboutRequest{Info: program(t, folder, map[string]any{"virtualenv": "venv", "toolchain": "pip"})})
	require.NoError(t, err)
	assert.Equal(t, filepath.Join(environment, "bin", "python"), about.GetExecutable())
	assert.Regexp(t, `^3\.`, about.GetVersion())
	assert.Equal(t, "Pip", about.GetMetadata()["toolchain"])
}

func TestPluginInfoAndWhatIsLeftOut(t *testing.T) {
	c := client(t, "executor")
	_, err := c.GetPluginInfo(context.Background(), &emptypb.Empty{})
	require.NoError(t, err)
	_, err = c.GeneratePackage(context.Background(), &pulumirpc.GeneratePackageRequest{})
	assert.ErrorContains(t, err, "not implemented")
	response, err := connected(t, "executor").Run(context.Background(), &pulumirpc.RunRequest{AttachDebugger: true})
	require.NoError(t, err)
	assert.Contains(t, response.GetError(), "debugger is not supported")
}

// pack stands in for the Python SDK's `pulumi.policy`: it serves nothing, prints a port and records its call.
const pack = `
import json, os, sys, time
record = {"arguments": sys.argv[1:] + [os.getcwd()], "environment": dict(os.environ), "prefix": sys.prefix}
with open("record.new", "w") as file:
    json.dump(record, file)
os.rename("record.new", "record")
print(1)
sys.exit(int(os.environ.get("EXIT", "0")))
`

func TestPolicyPackStartsInItsFolderOnceTheStackIsKnown(t *testing.T) {
	folder := t.TempDir()
	environment := venv(t, folder)
	distributionIn(t, environment, "pulumi", "3.0.0", "")
	sites, _ := filepath.Glob(filepath.Join(environment, "lib", "python3*", "site-packages", "pulumi"))
	require.NoError(t, os.Mkdir(filepath.Join(sites[0], "policy"), 0o755))
	write(t, filepath.Join(sites[0], "policy", "__main__.py"), pack)

	stream, err := connected(t, "executor").RunPlugin(context.Background(), &pulumirpc.RunPluginRequest{
		Pwd: "/", Kind: "analyzer", Args: []string{"127.0.0.1:1"}, Env: []string{"PATH=" + os.Getenv("PATH"), "EXIT=5"},
		// Relative to the pack, whatever the working directory of the run is.
		Info: program(t, folder, map[string]any{"virtualenv": "venv", "toolchain": "pip"}),
	})
	require.NoError(t, err)
	var port int
	first, err := stream.Recv()
	require.NoError(t, err)
	_, err = fmt.Sscanf(string(first.GetStdout()), "%d\n", &port)
	require.NoError(t, err)
	assert.NoFileExists(t, filepath.Join(folder, "record"), "the stack is not known yet")

	connection, err := grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", port),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer connection.Close()
	_, err = pulumirpc.NewAnalyzerClient(connection).ConfigureStack(context.Background(),
		&pulumirpc.AnalyzerStackConfigureRequest{
			Stack: "prod", Project: "project", Organization: "organization", DryRun: true,
			Config: map[string]string{"a:b": "c"},
		})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Join(folder, "record"))
		return err == nil
	}, 10*time.Second, 10*time.Millisecond)
	seen := recorded(t, filepath.Join(folder, "record"))
	assert.Equal(t, []string{"127.0.0.1:1", ".", folder}, seen.Arguments)
	assert.Equal(t, environment, seen.Prefix)
	for name, value := range map[string]string{
		"PULUMI_STACK": "prod", "PULUMI_PROJECT": "project", "PULUMI_ORGANIZATION": "organization",
		"PULUMI_DRY_RUN": "true", "PULUMI_CONFIG": `{"a:b":"c"}`, "VIRTUAL_ENV": environment,
	} {
		assert.Equal(t, value, seen.Environment[name], name)
	}
}

func TestPackWithoutItsVirtualEnvironmentIsAnError(t *testing.T) {
	stream, err := connected(t, "executor").RunPlugin(context.Background(), &pulumirpc.RunPluginRequest{
		Kind: "analyzer", Info: program(t, t.TempDir(), map[string]any{"toolchain": "pip"}),
	})
	require.NoError(t, err)
	_, err = stream.Recv()
	assert.ErrorContains(t, err, "doesn't exist")
}

func TestProviderWithMainRunsAndItsExitCodeIsPassedOn(t *testing.T) {
	folder := t.TempDir()
	venv(t, folder)
	write(t, filepath.Join(folder, "__main__.py"),
		"import sys\nprint('out', sys.argv[1])\nprint('err', file=sys.stderr)\nsys.exit(6)\n")
	stream, err := connected(t, "executor").RunPlugin(context.Background(), &pulumirpc.RunPluginRequest{
		Pwd: folder, Kind: "resource", Args: []string{"argument"}, Info: program(t, folder, map[string]any{"virtualenv": "venv"}),
	})
	require.NoError(t, err)
	var stdout, stderr bytes.Buffer
	code := int32(-1)
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		stdout.Write(message.GetStdout())
		stderr.Write(message.GetStderr())
		if exit, ok := message.GetOutput().(*pulumirpc.RunPluginResponse_Exitcode); ok {
			code = exit.Exitcode
		}
	}
	assert.Equal(t, "out argument\n", stdout.String())
	assert.Equal(t, "err\n", stderr.String())
	assert.Equal(t, int32(6), code)
}

func TestFolderThatIsNoPluginIsAnError(t *testing.T) {
	_, err := providerArguments(&pulumirpc.RunPluginRequest{Info: program(t, t.TempDir(), nil)})
	assert.ErrorContains(t, err, "neither __main__.py nor a buildable pyproject.toml")
}

func TestBuildablePackageRunsThroughTheSDK(t *testing.T) {
	folder := t.TempDir()
	write(t, filepath.Join(folder, "pyproject.toml"),
		"[project]\nname = \"mine\"\n[build-system]\nrequires = []\nbuild-backend = \"setuptools.build_meta\"\n")
	args, err := providerArguments(&pulumirpc.RunPluginRequest{Info: program(t, folder, nil), Args: []string{"a"}})
	require.NoError(t, err)
	assert.Equal(t, []string{"-m", "pulumi.run.plugin", "mine", "a"}, args)
}
