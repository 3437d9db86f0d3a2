"Model folders that are not whole, and adapters: one sentence, or the model that is meant, before anything is moved or trained."
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from densirl.config import make_config
from densirl.files import read_json, write_json
from densirl.folders import adapter_base, check_folder, tokenizer_folder
from densirl.grpo import GrpoConfig, first_policy, train_grpo
from densirl.models import load_policy, load_reward_model, load_tokenizer, model_input, start_path
from densirl.mode_collapse import EvalConfig, make_eval
from densirl.rm import RmConfig, train_rm
from densirl.runs import read_manifest
from densirl.sft import SftConfig, train_sft

def copy_of(folder, path, drop=('manifest.json',)):
    shutil.copytree(folder, path)
    for name in drop: (path/name).unlink(missing_ok=True)
    return path

def change(folder, edit):
    "Put other tensors into a folder"
    save_file({k: v.contiguous() for k, v in edit(load_file(folder/'model.safetensors')).items()}, folder/'model.safetensors', metadata=dict(format='pt'))

def settings(folder, **values): write_json(folder/'config.json', read_json(folder/'config.json') | values)

def pickled(folder, value):
    (folder/'model.safetensors').unlink()
    torch.save(value, folder/'pytorch_model.bin')

def in_parts(folder):
    load_policy(str(folder)).save_pretrained(folder, max_shard_size='100KB')
    (folder/'model.safetensors').unlink(missing_ok=True)
    sorted(folder.glob('model-*.safetensors'))[1].unlink()

def cut(folder, name, keep): os.truncate(folder/name, int((folder/name).stat().st_size*keep))

MISSING = dict(
    one=(lambda f: change(f, lambda t: {k: v for k, v in t.items() if k != 'model.layers.1.mlp.up_proj.weight'}), 'lack model.layers.1.mlp.up_proj.weight of LlamaForCausalLM; give a complete folder'),
    layer=(lambda f: change(f, lambda t: {k: v for k, v in t.items() if '.layers.1.' not in k}), 'lack model.layers.1.input_layernorm.weight and 8 more tensors'),
    module=(lambda f: change(f, lambda t: {f'module.{k}': v for k, v in t.items()}), "begin with 'module.', so a wrapper was saved"),
    compiled=(lambda f: change(f, lambda t: {f'_orig_mod.{k}': v for k, v in t.items()}), "begin with '_orig_mod.', so a wrapper was saved"),
    shape=(lambda f: change(f, lambda t: {k: v[:9] if 'layers.1.mlp.up_proj' in k else v for k, v in t.items()}), r'has shape \(9, 64\) and its config.json asks for \(128, 64\)'),
    width=(lambda f: settings(f, hidden_size='wide'), "cannot be loaded as a model .*hidden_size"),
    pickle=(lambda f: pickled(f, dict(a=torch.nn.Linear(1, 1))), 'pickle of more than tensors'),
    encoder=(lambda f: settings(f, model_type='t5', architectures=['T5ForConditionalGeneration']), 'cannot be loaded as a causal language model'))
NOT_WHOLE = dict(
    no_config=(lambda f: (f/'config.json').unlink(), 'has no config.json'),
    half_config=(lambda f: cut(f, 'config.json', .5), 'config.json is not valid JSON'),
    unknown=(lambda f: settings(f, model_type='nothing_known'), "model_type 'nothing_known'"),
    own_code=(lambda f: settings(f, model_type='mine', auto_map=dict(AutoModelForCausalLM='m.M')), 'code of its own .* does not run'),
    no_weights=(lambda f: (f/'model.safetensors').unlink(), 'has no weights'),
    empty=(lambda f: cut(f, 'model.safetensors', 0), 'breaks off or is damaged'),
    half=(lambda f: cut(f, 'model.safetensors', .5), 'breaks off or is damaged'),
    part=(in_parts, r'lacks model-00002-of-0000\d.safetensors, one of'),
    no_tokenizer=(lambda f: (f/'tokenizer.json').unlink(), 'has no tokenizer'),
    half_tokenizer=(lambda f: cut(f, 'tokenizer.json', .5), 'tokenizer.json is not valid JSON'))

@pytest.mark.parametrize('what', MISSING)
def test_a_policy_that_lacks_something_is_not_loaded(tiny_run, tmp_path, what):
    edit, said = MISSING[what]
    edit(copy_of(tiny_run/'outs/sft', tmp_path/'m'))
    with pytest.raises(ValueError, match=said) as caught: load_policy(str(tmp_path/'m'))
    assert '\n' not in str(caught.value) and str(tmp_path/'m') in str(caught.value)

@pytest.mark.parametrize('what', NOT_WHOLE)
def test_a_folder_that_is_no_model_is_refused_at_the_door(tiny_run, tmp_path, what):
    edit, said = NOT_WHOLE[what]
    edit(copy_of(tiny_run/'outs/sft', tmp_path/'m'))
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught: start_path(str(tmp_path/'m'), tmp_path/'m', 'sft')
    assert '\n' not in str(caught.value)

def test_a_pickle_of_tensors_alone_is_read(tiny_run, tmp_path):
    folder = copy_of(tiny_run/'outs/sft', tmp_path/'m')
    pickled(folder, load_file(folder/'model.safetensors'))
    check_folder(folder)
    for a, b in zip(load_policy(str(folder)).parameters(), load_policy(str(tiny_run/'outs/sft')).parameters()): assert torch.equal(a, b)

def test_a_reward_model_must_bring_its_head_and_a_language_model_nothing_but_its_head(tiny_run, tmp_path):
    change(copy_of(tiny_run/'outs/rm', tmp_path/'rm'), lambda t: {k: v for k, v in t.items() if 'score' not in k})
    with pytest.raises(ValueError, match='lack score.weight of LlamaForSequenceClassification'): load_reward_model(str(tmp_path/'rm'))
    assert load_reward_model(str(tiny_run/'outs/sft')).score.weight.shape == (1, 64)
    change(copy_of(tiny_run/'outs/sft', tmp_path/'lm'), lambda t: {k: v for k, v in t.items() if '.layers.1.' not in k})
    with pytest.raises(ValueError, match='lack model.layers.1.input_layernorm.weight'): load_reward_model(str(tmp_path/'lm'))

def contents(folder): return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}

@pytest.mark.parametrize('stage', ['sft', 'rm', 'grpo', 'grpo_rm'])
def test_a_stage_refuses_before_it_moves_the_run_that_is_there(tiny_run, tmp_path, stage):
    bad = copy_of(tiny_run/('outs/rm' if stage == 'grpo_rm' else 'outs/sft'), tmp_path/'bad')
    change(bad, lambda t: {k: v for k, v in t.items() if '.layers.1.' not in k}) if stage != 'grpo_rm' else cut(bad, 'model.safetensors', .5)
    config, train, flag = dict(sft=(SftConfig, train_sft, 'model'), rm=(RmConfig, train_rm, 'sft_ckpt_path'), grpo=(GrpoConfig, train_grpo, 'sft_ckpt_path'), grpo_rm=(GrpoConfig, train_grpo, 'rm_ckpt_path'))[stage]
    before = contents(tiny_run/'outs')
    with pytest.raises(ValueError, match='lack model.layers.1|breaks off'): train(make_config(config, 'test', root=str(tiny_run), **{flag: str(bad)}))
    assert contents(tiny_run/'outs') == before


# -- adapters

@pytest.fixture(scope='module')
def adapters(tiny_run, tmp_path_factory):
    "An adapter of the SFT model, the same beside its base's config.json, a reward model's, and what they come to when merged"
    home, base = tmp_path_factory.mktemp('adapters'), tiny_run/'outs/sft'
    torch.manual_seed(0)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], init_lora_weights=False, task_type='CAUSAL_LM'))
    for name in ('adapter', 'with_config', 'bare'):
        wrapped.save_pretrained(home/name)
        if name != 'bare': load_tokenizer(str(base)).save_pretrained(home/name)
    shutil.copy(base/'config.json', home/'with_config')
    wrapped.merge_and_unload().save_pretrained(home/'merged')
    judge = load_reward_model(str(base))
    reward = get_peft_model(judge, LoraConfig(r=4, target_modules=['q_proj'], init_lora_weights=False, task_type='SEQ_CLS'))
    with torch.no_grad(): [p.normal_() for n, p in reward.named_parameters() if 'score.modules_to_save' in n]
    reward.save_pretrained(home/'reward')
    load_tokenizer(str(base)).save_pretrained(home/'reward')
    reward.merge_and_unload().save_pretrained(home/'merged_reward')
    return home

@pytest.mark.parametrize('name', ['adapter', 'with_config', 'bare'])
def test_an_adapter_is_its_base_with_the_adapter_merged(adapters, tiny_run, name):
    ours, theirs = load_policy(str(adapters/name)), AutoModelForCausalLM.from_pretrained(adapters/'merged', dtype=torch.float32)
    start_path(str(adapters/name), adapters/name, 'sft')
    assert type(ours) is type(theirs) and all(p.requires_grad and 'lora' not in n for n, p in ours.named_parameters())
    for (n, a), (m, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == m
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert load_tokenizer(tokenizer_folder(str(adapters/name))).get_vocab() == load_tokenizer(str(tiny_run/'outs/sft')).get_vocab()

def test_an_adapter_of_a_reward_model_brings_its_head(adapters):
    ours, theirs = load_reward_model(str(adapters/'reward')), AutoModelForSequenceClassification.from_pretrained(adapters/'merged_reward', dtype=torch.float32)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match='is a reward model'): load_policy(str(adapters/'reward'))

def test_the_base_is_an_input_and_output_is_a_plain_folder(adapters, tiny_run):
    assert model_input('x', 'sft', adapters/'adapter') == dict(sft='x', sft_base=str((tiny_run/'outs/sft').resolve()))
    flags = dict(root=str(tiny_run), max_steps=1)
    out = train_sft(make_config(SftConfig, 'test', model=str(adapters/'adapter'), out_path='outs/from_adapter', **flags))
    assert set(read_manifest(out)['inputs']) == {'pairs', 'prompts', 'source', 'source_base'} and (out/'model.safetensors').exists() and not (out/'adapter_config.json').exists()
    train_rm(make_config(RmConfig, 'test', sft_ckpt_path=str(adapters/'adapter'), out_path='outs/rm_from_adapter', **flags))
    train_grpo(make_config(GrpoConfig, 'test', sft_ckpt_path=str(adapters/'adapter'), rm_ckpt_path=str(adapters/'reward'), density_aware=False, out_dir='outs/grpo_from_adapter', **flags))
    manifest = read_manifest(tiny_run/'outs/grpo_from_adapter')
    assert {'sft', 'sft_base', 'rm', 'rm_base'} <= set(manifest['inputs']) and {k: v['way'] for k, v in manifest['facts']['self_check'].items()} == dict(policy='seen', reward='seen')
    out = make_eval(make_config(EvalConfig, 'test', root=str(tiny_run), samples='weights', ckpt_paths=(str(adapters/'adapter'),), gold_path='', n_prompts=2, max_new_tokens=3, out_path='outs/eval_adapter'))
    assert read_manifest(out)['facts']['self_check'][str(adapters/'adapter')]['way'] == 'seen' and 'grpo_base_adapter' in read_manifest(out)['inputs']

@pytest.mark.parametrize('edit, said', [
    (lambda s: s | dict(base_model_name_or_path='/nowhere/base'), 'its base model is not at /nowhere/base; put it there'),
    (lambda s: s | dict(peft_type='PREFIX_TUNING'), 'of the kind PREFIX_TUNING, and densirl merges LORA alone')])
def test_an_adapter_that_cannot_be_merged_is_one_sentence(adapters, tmp_path, edit, said):
    folder = copy_of(adapters/'adapter', tmp_path/'a')
    write_json(folder/'adapter_config.json', edit(read_json(folder/'adapter_config.json')))
    with pytest.raises((ValueError, FileNotFoundError), match=said): start_path(str(folder), folder, 'sft')

def test_tensors_of_an_adapter_must_find_their_place(adapters, tmp_path):
    folder = copy_of(adapters/'adapter', tmp_path/'a')
    path = folder/'adapter_model.safetensors'
    whole = load_file(path)
    for tensors, said in ((dict(list(whole.items())[1:]), 'lacks base_model'), (whole | {'base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight': torch.ones(4, 64)}, 'has a tensor without a place')):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=said): load_policy(str(folder))

def test_an_adapter_beside_whole_weights_is_ambiguous(adapters, tiny_run, tmp_path):
    folder = copy_of(adapters/'with_config', tmp_path/'a')
    shutil.copy(tiny_run/'outs/sft/model.safetensors', folder)
    with pytest.raises(ValueError, match='holds both an adapter and the weights of a whole model'): check_folder(folder)
