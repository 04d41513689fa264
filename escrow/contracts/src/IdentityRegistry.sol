// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC721} from "@openzeppelin/contracts/token/ERC721/ERC721.sol";
import {ERC721URIStorage} from "@openzeppelin/contracts/token/ERC721/extensions/ERC721URIStorage.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {SignatureChecker} from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";

import {IIdentityRegistry} from "./IRegistries.sol";
import {TypedData} from "./TypedData.sol";

/// @title The identity registry of ERC-8004, for local chains
/// @notice An agent is a token of ERC-721: whoever holds it decides what its file says and which wallet it
/// is paid to. On public chains the registry of the standard's authors is used; here nobody owns or
/// upgrades it.
contract IdentityRegistry is IIdentityRegistry, ERC721URIStorage, TypedData {
    uint256 public constant MAX_DEADLINE_DELAY = 5 minutes;
    bytes32 public constant AGENT_WALLET_SET_TYPEHASH =
        keccak256("AgentWalletSet(uint256 agentId,address newWallet,address owner,uint256 deadline)");
    string private constant WALLET = "agentWallet";

    uint256 private _next;
    mapping(uint256 agentId => mapping(string key => bytes)) private _metadata;

    /// @dev Name and symbol are constants below, so that the code works without its constructor.
    constructor() ERC721("", "") {}

    function name() public pure override returns (string memory) {
        return "AgentIdentity";
    }

    function symbol() public pure override returns (string memory) {
        return "AGENT";
    }

    /// @inheritdoc IIdentityRegistry
    function register(string memory agentURI, MetadataEntry[] memory metadata) public returns (uint256 agentId) {
        agentId = _next++;
        _setMetadata(agentId, WALLET, abi.encodePacked(msg.sender));
        if (bytes(agentURI).length > 0) _setTokenURI(agentId, agentURI);
        emit Registered(agentId, agentURI, msg.sender);
        for (uint256 i = 0; i < metadata.length; ++i) {
            _checkKey(metadata[i].metadataKey);
            _setMetadata(agentId, metadata[i].metadataKey, metadata[i].metadataValue);
        }
        _safeMint(msg.sender, agentId);
    }

    function register(string memory agentURI) external returns (uint256 agentId) {
        return register(agentURI, new MetadataEntry[](0));
    }

    function register() external returns (uint256 agentId) {
        return register("", new MetadataEntry[](0));
    }

    function setAgentURI(uint256 agentId, string calldata newURI) external {
        _checkCaller(agentId);
        _setTokenURI(agentId, newURI);
        emit URIUpdated(agentId, newURI, msg.sender);
    }

    function getMetadata(uint256 agentId, string calldata metadataKey) external view returns (bytes memory) {
        return _metadata[agentId][metadataKey];
    }

    function setMetadata(uint256 agentId, string calldata metadataKey, bytes calldata metadataValue) external {
        _checkCaller(agentId);
        _checkKey(metadataKey);
        _setMetadata(agentId, metadataKey, metadataValue);
    }

    /// @inheritdoc IIdentityRegistry
    function setAgentWallet(uint256 agentId, address newWallet, uint256 deadline, bytes calldata signature) external {
        _checkCaller(agentId);
        if (newWallet == address(0)) revert BadWallet(newWallet);
        if (block.timestamp > deadline || deadline > block.timestamp + MAX_DEADLINE_DELAY) revert BadDeadline(deadline);
        bytes32 digest = _digest(
            keccak256(abi.encode(AGENT_WALLET_SET_TYPEHASH, agentId, newWallet, ownerOf(agentId), deadline))
        );
        // ECDSA first: an account with delegated code need not know ERC-1271.
        (address signer,,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (signer != newWallet && !SignatureChecker.isValidERC1271SignatureNowCalldata(newWallet, digest, signature)) {
            revert InvalidWalletSignature(newWallet);
        }
        _setMetadata(agentId, WALLET, abi.encodePacked(newWallet));
    }

    function getAgentWallet(uint256 agentId) external view returns (address) {
        return address(bytes20(_metadata[agentId][WALLET]));
    }

    function unsetAgentWallet(uint256 agentId) external {
        _checkCaller(agentId);
        _setMetadata(agentId, WALLET, "");
    }

    /// @inheritdoc IIdentityRegistry
    function isAuthorizedOrOwner(address spender, uint256 agentId) external view returns (bool) {
        return _isAuthorized(ownerOf(agentId), spender, agentId);
    }

    /// @dev A new owner's agent must not go on being paid to the old owner's wallet.
    function _update(address to, uint256 agentId, address auth) internal override returns (address from) {
        from = super._update(to, agentId, auth);
        if (from != address(0) && from != to) _setMetadata(agentId, WALLET, "");
    }

    function _setMetadata(uint256 agentId, string memory key, bytes memory value) private {
        _metadata[agentId][key] = value;
        emit MetadataSet(agentId, key, key, value);
    }

    function _checkKey(string memory key) private pure {
        if (keccak256(bytes(key)) == keccak256(bytes(WALLET))) revert ReservedKey(key);
    }

    function _checkCaller(uint256 agentId) private view {
        if (!_isAuthorized(ownerOf(agentId), msg.sender, agentId)) revert NotAuthorized(agentId, msg.sender);
    }

    function _domain() internal pure override returns (string memory, string memory) {
        return ("ERC8004IdentityRegistry", "1");
    }
}
