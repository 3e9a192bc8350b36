package config

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// AzureCredentials are at most one of three.
type AzureCredentials struct{ AccountKey, SAS, ConnectionString Secret }

// Credentials are those of the configuration or of the file that it names.
func (a *Azure) Credentials() (AzureCredentials, error) {
	c := AzureCredentials{a.AccountKey, a.SAS, a.ConnectionString}
	if a.CredentialsFile == "" {
		return c, nil
	}
	f, err := os.Open(a.CredentialsFile)
	if err != nil {
		return c, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		into := map[string]*Secret{"account_key": &c.AccountKey, "sas": &c.SAS, "connection_string": &c.ConnectionString}[strings.TrimSpace(key)]
		if into == nil { // without the line: it may be the secret itself
			return c, fmt.Errorf("%s: line %d: want account_key=, sas= or connection_string=", a.CredentialsFile, n)
		}
		*into = Secret(strings.TrimSpace(value))
	}
	if err := lines.Err(); err != nil {
		return c, fmt.Errorf("%s: %w", a.CredentialsFile, err)
	}
	if c == (AzureCredentials{}) {
		return c, fmt.Errorf("%s: holds no account_key, sas or connection_string", a.CredentialsFile)
	}
	return c, nil
}

func checkAzure(col *collector, key string, a Azure) {
	if a.Container == "" {
		col.addMissing(key+".container", "the container is missing")
	} else if len(a.Container) < 3 || len(a.Container) > 63 || strings.Trim(a.Container, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		col.add(Problem{Key: key + ".container", Value: a.Container, Msg: fmt.Sprintf("%q is no container name: 3 to 63 of a-z 0-9 -", a.Container)})
	}
	checkPlace(col, key, a.Endpoint, a.Prefix, a.CAFile)
	given := 0
	for _, s := range []string{string(a.AccountKey), string(a.SAS), string(a.ConnectionString), a.CredentialsFile} {
		if s != "" {
			given++
		}
	}
	switch {
	case given > 1:
		col.add(Problem{Key: key, Msg: "has several of account_key, sas, connection_string and credentials_file; only one of them can be right"})
	case a.CredentialsFile != "" && !strings.HasPrefix(a.CredentialsFile, "/"):
		checkAbs(col, key+".credentials_file", a.CredentialsFile)
	default:
		c, err := a.Credentials()
		if err != nil {
			col.add(Problem{Key: key + ".credentials_file", Value: a.CredentialsFile, Msg: err.Error()})
		} else if a.Account == "" && c.ConnectionString == "" {
			col.addMissing(key+".account", "the account is missing")
		}
	}
}
